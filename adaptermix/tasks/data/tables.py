"""What readers share: rows, records of TSV, CSV and JSONL by the names of their columns, and `--rows`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from ...errors import DataError
from ...models.languages import canonical_language
from ...provenance.row_hashes import RowTexts
from .files import DataFile, parse_rows, several_languages


class Recognisable(Protocol):
    """A row of data."""

    @property
    def row_texts(self) -> RowTexts:
        """The texts by which the row is recognised in other files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a task's data.

    Args:
        language: Language code.
        cluster: Name of the group of dependent rows that this one belongs to, such as a document; empty for none.
    """

    language: str
    cluster: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that the row is about, without any prompt."""
        raise NotImplementedError

    @property
    def row_texts(self) -> RowTexts:
        return RowTexts(self.texts)


R = TypeVar("R", bound=Recognisable)
LANGUAGE_NAMES = ("language", "lang", "locale")
CLUSTER_NAMES = ("cluster", "document_id", "doc_id", "docid")
"""Columns and fields that name the group of dependent rows that a row belongs to."""
ROW_NAMES = {"language": LANGUAGE_NAMES, "cluster": CLUSTER_NAMES}
_TABLES = {".tsv", ".csv", ".txt", ".iob2", ".conll"}


def row_language(file: DataFile, named: object = None) -> str:
    """Return the language of a row: from the argument, else from the row, else from the file's name.

    Raises:
        DataError: the language is unknown.
    """
    if named and not file.is_given:
        code = str(named)
        return canonical_language(code) or canonical_language(code.split("-", maxsplit=1)[0]) or code
    if file.language is None:
        raise DataError(
            f"{file.path}: the language must show in the file's name (de.train.tsv) or be given (de=FILE)"
            f"{several_languages(file)}.",
            code="data.no-language",
        )
    return file.language


def named_language(row: Mapping[str, object]) -> object:
    """Return the language that a JSON row names, or None."""
    return next((row[name] for name in LANGUAGE_NAMES if row.get(name) is not None), None)


def row_cluster(row: Mapping[str, object]) -> str:
    """Return the name of the group of dependent rows that a JSON row belongs to, or nothing."""
    return next((str(row[name]) for name in CLUSTER_NAMES if row.get(name) is not None), "")


def is_json(file: DataFile) -> bool:
    """Return whether a file is JSONL, not a table: by its name, else by its first line.

    Raises:
        DataError: every line is blank.
    """
    first = next((line.strip() for _, line in file.lines() if line.strip()), None)
    if first is None:
        raise DataError(f"a data file must hold rows, and {file.path} has blank lines only.", code="data.blank")
    suffixes = set(file.suffixes)
    if suffixes & {".jsonl", ".json"}:
        return True
    return not suffixes & _TABLES and first.startswith("{") and first.endswith("}")


def records(
    file: DataFile,
    names: Mapping[str, Sequence[str]],
    order: Sequence[str],
    *,
    label: str | None = None,
    optional: Collection[str] = (),
) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield numbered records; a record of several lines has the number of its last one.

    None stands for a record that lacks a field or has an empty one, or whose label is null, as unlabelled rows of data
    sets of the Hub have it.

    Args:
        file: JSONL, CSV with quotes, or TSV, where quotes have no meaning.
        names: For each field the names that a column may have, the best first; case does not count.
        order: The fields that must be there, in the order of the columns where there is no header.
        label: The field that may be null, if any.
        optional: Fields of the order that may be empty, and that a header may lack.

    Raises:
        DataError: every record lacks a field or has an empty one; one has other columns than the first.
    """
    usable = False
    faults = []
    required = [field for field in order if field not in optional]
    for number, record in _every(file, names, order, label, required):
        stripped = record and {field: value.strip() for field, value in record.items()}
        lacking = [field for field in required if not stripped.get(field)] if stripped is not None else []
        if lacking:
            faults.append(
                f"{file.path}:{number}: a row must have {' and '.join(required)}, and its {lacking[0]} is missing."
            )
        usable = usable or not lacking
        yield number, None if lacking else stripped
    if faults and not usable:
        raise DataError(faults[0], code="row.missing-field")


def _every(
    file: DataFile,
    names: Mapping[str, Sequence[str]],
    order: Sequence[str],
    label: str | None,
    required: Sequence[str],
) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield numbered records as the file has them; None for one whose label is null."""
    if is_json(file):
        for number, row in file.json_rows():
            is_unlabelled = label and _is_null(row, names[label])
            yield number, None if is_unlabelled else _from_json(file, number, row, names)
        return
    columns: dict[str, int] | None = None
    width = len(order)
    for index, (number, cells) in enumerate(table_cells(file)):
        if index == 0 and (header := _header(file, number, cells, names, required)):
            columns, width = header, len(cells)
            continue
        if len(cells) != width:
            expected = "as many as the header" if columns else f"{', '.join(order)}, or a header that names more"
            raise DataError(
                f"{file.path}:{number}: a row must have {width} columns ({expected}), "
                f"found {len(cells)}: {' '.join(cells)[:60]!r}.",
                code="table.columns",
            )
        used = columns or {field: index for index, field in enumerate(order)}
        yield number, {field: cells[index] for field, index in used.items()}


def table_cells(file: DataFile) -> Iterator[tuple[int, list[str]]]:
    """Yield the numbered rows of CSV with quotes, or of TSV, where quotes have no meaning; blank rows are skipped.

    A row of several lines has the number of its last one.

    Raises:
        DataError: quotes are not closed, or not doubled inside.
    """
    if ".csv" not in file.suffixes:
        yield from ((number, line.split("\t")) for number, line in file.lines() if line.strip())
        return
    reader = csv.reader((line + "\n" for _, line in file.lines()), strict=True)
    try:
        for row in filter(None, reader):
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{file.path}:{reader.line_num}: quotes must be closed and doubled inside: {error}.", code="table.quotes"
        ) from error


def _header(
    file: DataFile, number: int, cells: Sequence[str], names: Mapping[str, Sequence[str]], order: Sequence[str]
) -> dict[str, int] | None:
    """Return the column of each field if this row is a header."""
    lowered = [cell.strip().lower() for cell in cells]
    chosen = {field: next((name for name in known if name in lowered), None) for field, known in names.items()}
    columns = {field: lowered.index(name) for field, name in chosen.items() if name}
    lacking = [field for field in order if field not in columns]
    if len(lacking) == len(order):
        return None
    if lacking:  # taken for data, the header would be a row with a label that does not exist
        raise DataError(
            f"{file.path}:{number}: a header must name {' and '.join(order)}, found {' '.join(lowered)[:60]!r}. "
            f"Call the column of the {lacking[0]} {names[lacking[0]][0]!r}, or put a header before data without one.",
            code="table.header",
        )
    twice = [name for name in chosen.values() if name and lowered.count(name) > 1]
    if twice:
        raise DataError(
            f"{file.path}:{number}: a header must name a column once, and {twice[0]!r} occurs twice.",
            code="table.column-twice",
        )
    return columns


def _is_null(row: Mapping[str, object], known: Sequence[str]) -> bool:
    values = [value for key, value in row.items() if key.strip().lower() in known]
    return bool(values) and all(value is None for value in values)


def _from_json(
    file: DataFile, number: int, row: Mapping[str, object], names: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    lowered = {key.strip().lower(): value for key, value in row.items()}
    record = {}
    for field, known in names.items():
        value = next((lowered[name] for name in known if lowered.get(name) is not None), None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(
                f"{file.path}:{number}: the {field} must be text or a number, found {type(value).__name__}.",
                code="table.not-text",
            )
        record[field] = str(value)
    return record


def usable(rows: Iterable[R | DataError | None]) -> Iterator[R | None]:
    """Yield rows, and None for rows with a fault, so that one of them does not refuse the whole file.

    Args:
        rows: Rows; a fault instead of a row that cannot be used.

    Raises:
        DataError: no row can be used; the first fault.
    """
    faults: list[DataError] = []
    is_usable = False
    for row in rows:
        if isinstance(row, DataError):
            faults.append(row)
            yield None
        else:
            is_usable = is_usable or row is not None
            yield row
    if faults and not is_usable:
        raise faults[0]


def pick_rows(
    files: Sequence[DataFile], rows: str | None, read: Callable[[DataFile], Iterable[R | None]]
) -> tuple[list[R], list[DataFile]]:
    """Read the rows of each file that `rows` (`START:STOP[:STEP]`) picks.

    Args:
        files: Data files.
        rows: Which rows of each file; None for all.
        read: Reads one file; None stands for a row that counts as a row and is left out.

    Returns:
        The rows, and the files with the count of those left out.

    Raises:
        DataError: a file has no usable row in the range, or is malformed.
    """
    chosen = parse_rows(rows)
    kept: list[R] = []
    counted = []
    for file in files:
        every = iter(read(file))
        whole = list(islice(every, chosen.stop))  # rows after the last one of the range are not read
        picked = whole[chosen]
        here = [row for row in picked if row is not None]
        if here and isinstance(every, Generator):
            every.close()  # a reader may have checks to make at its end
        if not here:
            whole += every
            omitted = sum(row is None for row in whole)
            without = f", {omitted} of them without a label, an answer or a text" if omitted else ""
            raise DataError(
                f"{file.path} must have rows in the requested range ({rows or 'all'}), it has {len(whole)}{without}.",
                code="data.none-in-rows",
            )
        kept += here
        counted.append(file.using(partial(texts_of, here), rows, len(picked) - len(here)))
    return kept, counted


def texts_of(rows: Iterable[Recognisable]) -> Iterator[RowTexts]:
    """Yield the texts by which rows are recognised."""
    return (row.row_texts for row in rows)


def lines_used(file: DataFile, lines: Sequence[str], rows: str | None, left_out: int = 0) -> DataFile:
    """Return a file of one sentence a line with the lines of it that are used; see `DataFile.using`."""
    return file.using(lambda: (RowTexts((line,)) for line in lines), rows, left_out)
