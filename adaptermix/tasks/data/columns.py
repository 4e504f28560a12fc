"""Data files whose columns have other names than the fields of a task (`--columns`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from ...errors import DataError
from ...io.json_types import JsonObject
from .files import DataFile, find_files
from .hub import HubData
from .tables import is_json, table_cells


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedColumns(DataFile):
    """A file of JSONL, CSV or TSV, read as one JSON object a line in which fields have the names that tasks know.

    Args:
        original: The file on the disk; a table must have a header.
        columns: The column of each field.
    """

    original: DataFile
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def suffixes(self) -> list[str]:
        return [".jsonl"]

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield numbered rows as JSON, with the numbers of the file.

        Raises:
            DataError: the file lacks a column, or a row has other columns than the header.
        """
        names: Sequence[str] = []
        is_known = False
        for number, row in self.original.json_rows() if is_json(self.original) else self._of_table():
            names = list(row)
            named = {name: row[column] for name, column in self.columns.items() if column in row}
            is_known = is_known or len(named) == len(self.columns)
            yield number, json.dumps(row | named, ensure_ascii=False)
        if names and not is_known:
            lacking = next(column for column in self.columns.values() if column not in names)
            raise DataError(
                f"{self.path} must have the columns of --columns, and {lacking!r} is missing; its columns are "
                f"{', '.join(names)}.",
                code="columns.missing",
            )

    def _of_table(self) -> Iterator[tuple[int, JsonObject]]:
        header: list[str] | None = None
        for number, cells in table_cells(self.original):
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{self.path}:{number}: a row must have {len(header)} columns (as many as the header), found "
                    f"{len(cells)}: {' '.join(cells)[:60]!r}.",
                    code="table.columns",
                )
            yield number, dict(zip(header, cells, strict=True))

    def hashes(self) -> dict[str, str]:
        return self.original.hashes()


def find_rows(arguments: Sequence[str], task: str, columns: Mapping[str, str]) -> list[DataFile]:
    """Resolve `FILE` arguments, see `find_files`, whose columns may have other names.

    Args:
        arguments: Paths, globs, `LANGUAGE=FILE` or data sets of the Hub.
        task: Name of the task that reads them.
        columns: The column of each field whose name differs.
    """
    files = find_files(arguments, task)
    return [_named(file, columns) for file in files] if columns else files


def _named(file: DataFile, columns: Mapping[str, str]) -> DataFile:
    if isinstance(file, HubData):
        return replace(file, columns={**file.columns, **columns})
    same = {each.name: getattr(file, each.name) for each in fields(DataFile)}
    return NamedColumns(**same, original=file, columns=columns)
