"""Labelled texts: TSV, CSV and JSONL, and trees with one folder per language such as that of NusaX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...errors import DataError
from ...provenance.row_hashes import RowTexts
from .files import DataFile, find_files
from .tables import CLUSTER_NAMES, LANGUAGE_NAMES, is_json, pick_rows, records, row_language, table_cells

_NAMES = {
    "text": ("text", "sentence", "tweet", "review", "utterance"),
    "label": ("label", "sentiment", "category", "class", "intent"),
    "language": LANGUAGE_NAMES,
    "cluster": CLUSTER_NAMES,
}
# NusaX names its folders in English. Codes as folders are not read: `ml`, `cv` and `my` are languages too.
_FOLDERS = {
    "acehnese": "ace",
    "balinese": "ban",
    "banjarese": "bjn",
    "buginese": "bug",
    "english": "en",
    "indonesian": "id",
    "javanese": "jv",
    "madurese": "mad",
    "minangkabau": "min",
    "ngaju": "nij",
    "sundanese": "su",
    "toba_batak": "bbc",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRow:
    """A text with its label.

    Args:
        text: The text, without blanks at its ends.
        label: The label, one line of text.
        language: Language code.
        cluster: Name of the group of dependent rows that this one belongs to, such as a document; empty for none.
    """

    text: str
    label: str
    language: str
    cluster: str = ""

    @property
    def row_texts(self) -> RowTexts:
        """Return the texts by which the row is recognised in other files."""
        return RowTexts((self.text,))


def _read(file: DataFile) -> Iterator[ClassifyRow | None]:
    for number, record in records(file, _NAMES, order=("text", "label"), label="label"):
        if record is None:
            yield None
            continue
        label = record["label"]
        if len(label.splitlines()) != 1:  # an answer ends at its line's end
            raise DataError(f"{file.path}:{number}: a label must be one line, found {label[:60]!r}.")
        yield ClassifyRow(
            text=record["text"],
            label=label,
            language=row_language(file, record.get("language")),
            cluster=record.get("cluster", ""),
        )


def _may_be_header(file: DataFile, first: ClassifyRow | None) -> bool:
    """Return whether a first row has one word in each of its two columns."""
    if is_json(file) or first is None or not (first.text.isidentifier() and first.label.isidentifier()):
        return False
    _, cells = next(table_cells(file))
    return [cell.strip() for cell in cells] == [first.text, first.label]  # else it stands below a header


def _refuse_header(file: DataFile, first: ClassifyRow, rows: Sequence[ClassifyRow | None]) -> None:
    """Refuse a first row that looks like a header of other names: its label is that of no other row."""
    others = [row.label for row in rows if row]
    if len(others) > 1 and first.label not in others and len(set(others)) < len(others):
        raise DataError(
            f"{file.path}:1: labels must occur more than once, and the first row looks like a header: {first.text!r}, "
            f"{first.label!r}. Name its columns 'text' and 'label', or put such a header before it if it is data."
        )


def _read_checked(file: DataFile) -> Iterator[ClassifyRow | None]:
    """Yield the rows; the whole file is read at once only if its first row may be a header."""
    rows = _read(file)
    for first in rows:
        if first and _may_be_header(file, first):
            others = list(rows)
            _refuse_header(file, first, others)
            yield from (first, *others)
        else:
            yield first
            yield from rows


def _with_folder(file: DataFile) -> DataFile:
    code = _FOLDERS.get(file.path.absolute().parent.name.lower())
    return file if file.languages or code is None else replace(file, languages=(code,))


def read_classify(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[ClassifyRow], list[DataFile]]:
    """Read labelled texts.

    The language is the one given (`de=FILE`), else that of the row's column or field `language`, else that of the
    file's name, else that of the file's folder if this has the English name that NusaX gives it (Winata et al., NusaX,
    EACL 2023, arXiv 2205.15960).

    Args:
        arguments: `FILE` arguments: TSV or CSV with a header (`text`, `label`, maybe `language`; other columns are
            passed over) or of two columns in this order, or JSONL with these fields.
        rows: `START:STOP[:STEP]` of the rows of each file.

    Returns:
        The rows in file order, and the files. Rows whose label is null are left out; they count as rows.

    Raises:
        DataError: a file is missing, empty, malformed, or does not tell its language.
    """
    files = [_with_folder(file) for file in find_files(arguments)]
    return pick_rows(files, rows, _read_checked)
