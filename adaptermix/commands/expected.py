"""`expect` of a recipe: the figures of a paper, and those of this run next to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from ..errors import OutputError, near_or_known
from ..io.files import write_whole
from ..io.json_types import JsonObject
from ..io.limited_yaml import Filling, shortened
from ..io.markup import as_markdown, markdown_table
from ..io.yaml_lines import Faults
from ..options.base import described

FILES = ("expected.json", "expected.md")
"""Files for the tables in the folder of a run."""
_HEADS = (b'{\n "expected": ', b"# Expected figures\n")
"""How these files start, by which they are recognised."""
_ROW = "row"
_TITLES = ("row", "column", "theirs", "ours", "difference", "runs")


def _as_text_keys(value: object) -> object:
    """Return a mapping with texts as keys: YAML reads the key 8 as a number."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Keys = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
Figures = list[FiniteFloat | None]


class Table(BaseModel):
    """A table of expected figures, as a recipe has it.

    Args:
        title: Where the figures are from, such as `table 3, slot F1`.
        columns: For each column of the paper's table the keys of our figure in the JSON document of the step, with dots
            between the levels, such as `groups.transfer`. The figure of several keys is their mean.
        rows: For each row one figure per column; null for a column without a figure.
        step: The step that has our figures: its name, or its command if no other step has that. `${row}`, here and in
            the keys, stands for the name of the row.
        unit: `percent` if the figures are percentages: ours are multiplied by 100.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    columns: Annotated[dict[str, Keys], BeforeValidator(_as_text_keys), Field(min_length=1)]
    rows: Annotated[dict[str, Figures], BeforeValidator(_as_text_keys), Field(min_length=1)]
    step: str = "${row}"
    unit: Literal["share", "percent"] = "share"

    def compare(self, documents: Sequence[tuple[str, JsonObject | None]]) -> Expected:
        """Return the cells of the table, each with our figure if there is one.

        Args:
            documents: Name and JSON document of each step; None for the document of a step that did not run.
        """
        cells = []
        for row, figures in self.rows.items():
            name = self.step.replace("${row}", row)
            ran = [document for step, document in documents if step == name and document is not None]
            for (column, keys), theirs in zip(self.columns.items(), figures, strict=True):
                if theirs is None:
                    continue
                values = [_mean_of(document, [key.replace("${row}", row) for key in keys]) for document in ran]
                ours = [value * (100 if self.unit == "percent" else 1) for value in values if value is not None]
                cells.append(
                    Cell(
                        row=row,
                        column=column,
                        theirs=theirs,
                        ours=fmean(ours) if ours else None,
                        runs=len(ours),
                        is_run=bool(ran),
                    )
                )
        return Expected(title=self.title, unit=self.unit, cells=cells)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A figure of a paper, and ours.

    Args:
        row: Its row.
        column: Its column.
        theirs: The paper's figure.
        ours: Ours, the mean over the runs; None if it is missing.
        runs: Number of steps of that name whose documents have the figure.
        is_run: Whether such a step ran. If it did and our figure is missing, its document lacks the key.
    """

    row: str
    column: str
    theirs: float
    ours: float | None
    runs: int
    is_run: bool

    def document(self) -> JsonObject:
        """Return plain data."""
        difference = None if self.ours is None else self.ours - self.theirs
        return {
            "row": self.row,
            "column": self.column,
            "theirs": self.theirs,
            "ours": self.ours,
            "difference": difference,
            "runs": self.runs,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The cells of a table after a run.

    Args:
        title: Title of the table.
        unit: `share` or `percent`.
        cells: Its cells.
    """

    title: str
    unit: str
    cells: Sequence[Cell]

    def document(self) -> JsonObject:
        """Return plain data."""
        return {"title": self.title, "unit": self.unit, "cells": [cell.document() for cell in self.cells]}

    @property
    def heading(self) -> str:
        """The title, with the unit if the figures are percentages."""
        return f"{self.title} (percent)" if self.unit == "percent" else self.title

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return titles and rows for display."""
        form = ".1f" if self.unit == "percent" else ".3f"
        rows = []
        for cell in self.cells:
            ours, difference = "no such figure" if cell.is_run else "not run", ""
            if cell.ours is not None:
                ours, difference = f"{cell.ours:{form}}", f"{cell.ours - cell.theirs:+{form}}"
            runs = str(cell.runs) if cell.runs else ""
            rows.append([cell.row, cell.column, f"{cell.theirs:{form}}", ours, difference, runs])
        return list(_TITLES), rows


def read_tables(
    value: object, variables: Mapping[str, object], names: Sequence[str] | None, faults: Faults
) -> list[Table]:
    """Read and check the tables of a recipe.

    Args:
        value: The value of `expect`.
        variables: The variables of the recipe.
        names: The name of each step, or its command; None if steps have faults.
        faults: Errors are added here.
    """
    if not isinstance(value, list):
        faults.at(("expect",), f"expect must be a list of tables, found {shortened(value)}.")
        return []
    fill = Filling({**variables, _ROW: "${row}"}, faults)
    tables = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            faults.at(
                ("expect", number - 1), f"expect, table {number}: a table must be a mapping, found {shortened(entry)}."
            )
            continue
        try:
            table = Table(**{str(key): fill(item) for key, item in entry.items()})
        except ValidationError as error:
            for _, message in described(error, Table):
                faults.at(("expect", number - 1), f"expect, table {number}: {message}")
            continue
        tables.append(table)
        for fault in _faults_of(table, names):
            faults.at(("expect", number - 1), f"expect, table {number}: {fault}")
    return tables


def _faults_of(table: Table, names: Sequence[str] | None) -> list[str]:
    """Return the faults of a table: rows of another length, and steps that the recipe lacks."""
    faults = []
    for row, figures in table.rows.items():
        if len(figures) != len(table.columns):
            faults.append(
                f"rows: {row!r} must have a figure for each of the {len(table.columns)} columns, found {len(figures)}."
            )
        step = table.step.replace("${row}", row)
        if names is not None and step not in names:
            faults.append(f"a row must name a step, and no step is named {step!r}.{near_or_known(step, {*names})}")
    return faults


def _mean_of(document: JsonObject, keys: Sequence[str]) -> float | None:
    """Return the mean of figures in a document; None if one is missing."""
    figures = [figure for key in keys if (figure := figure_of(document, key)) is not None]
    return fmean(figures) if len(figures) == len(keys) else None


def figure_of(document: object, key: str) -> float | None:
    """Return the number at a key of a JSON document; None without such a number.

    Args:
        document: The document. The number of a score (`{"value": ..., "low": ...}`) is its value.
        key: Names of the levels with dots between them; a name may contain dots itself.

    Example:
        >>> figure_of({"scores": {"de": {"value": 0.5, "low": 0.4}}}, "scores.de")
        0.5
    """
    if not key:
        number = document.get("value") if isinstance(document, dict) else document
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        return float(number) if is_number else None  # type: ignore[arg-type]
    if not isinstance(document, dict):
        return None
    for name in sorted(document, key=len, reverse=True):
        if key == name or key.startswith(f"{name}."):
            figure = figure_of(document[name], key[len(name) + 1 :])
            if figure is not None:
                return figure
    return None


def write_tables(tables: Sequence[Expected], folder: Path) -> None:
    """Write the tables into the folder of a run, as JSON and as Markdown."""
    document = {"expected": [table.document() for table in tables]}
    text = "# Expected figures\n"
    for table in tables:
        titles, rows = table.table()
        text += f"\n{as_markdown(table.heading, limit=1000)}\n\n{markdown_table(titles, rows, names=2)}"
    for name, content in zip(FILES, (json.dumps(document, indent=1) + "\n", text), strict=True):
        write_whole(folder / name, content.encode())


def check_files(folder: Path) -> None:
    """Refuse to replace files that no run of a recipe wrote.

    Raises:
        OutputError: there is such a file.
    """
    for name, head in zip(FILES, _HEADS, strict=True):
        path = folder / name
        if path.exists() and not (path.is_file() and path.read_bytes().startswith(head)):
            raise OutputError(
                f"a recipe with expect writes {path}, which must be new or of an earlier run, and it is something "
                "else. Move it away, or give another out=FOLDER.",
                code="expect.other-file",
            )
