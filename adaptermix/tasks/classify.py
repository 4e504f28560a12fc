"""Text classification: TSV, CSV and JSONL, and trees with one folder per language such as NusaX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import DataError
from .base import task
from .data.files import DataFile, find_files
from .data.tables import is_json, table_cells
from .labels import LabelledRow, LabelledTask
from .metrics import Metric
from .prompts import Template, table

# NusaX names its folders in English. Codes are not read from folders: `ml`, `cv` and `my` are languages too.
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
class ClassifyRow(LabelledRow):
    """A text with its label."""

    text: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)


def _may_be_header(file: DataFile, first: ClassifyRow | None) -> bool:
    """Return whether a first row has one word in each of its two columns."""
    if is_json(file) or first is None or not (first.text.isidentifier() and first.label.isidentifier()):
        return False
    _, cells = next(table_cells(file))
    return [cell.strip() for cell in cells] == [first.text, first.label]  # otherwise the row is below a header


def _refuse_header(file: DataFile, first: ClassifyRow, rows: Sequence[ClassifyRow | None]) -> None:
    """Refuse a first row that looks like a header of other names: no other row has its label."""
    others = [row.label for row in rows if row]
    if len(others) > 1 and first.label not in others and len(set(others)) < len(others):
        raise DataError(
            f"{file.path}:1: labels must occur more than once, and the first row looks like a header: {first.text!r}, "
            f"{first.label!r}. Name its columns 'text' and 'label', or put such a header before it if it is data.",
            code="row.header-like",
        )


def _with_folder(file: DataFile) -> DataFile:
    code = _FOLDERS.get(file.path.absolute().parent.name.lower())
    return file if file.languages or code is None else replace(file, languages=(code,))


@task
class Classify(LabelledTask[ClassifyRow]):
    """Text classification, scored by accuracy.

    Accuracy is the headline metric because it is the same sum over rows for every set of labels,
    so that languages and resamples compare. `macro_f1` is the metric of NusaX (Winata et al., NusaX, EACL 2023,
    arXiv 2205.15960): the mean over labels of F1, over the labels that a language's gold rows have. An answer that is
    not a label of any row is wrong.

    Files are TSV or CSV with a header (`text`, `label`, optionally `language`; other columns are ignored) or with two
    columns in this order, or JSONL with these fields. The language comes from
    the argument (`de=FILE`), else the row's `language`, else the file's name, else its folder, if this has the English
    name that NusaX uses.
    """

    name = "classify"
    row = ClassifyRow
    columns = {
        "text": ("text", "sentence", "tweet", "review", "utterance"),
        "label": ("label", "sentiment", "category", "class", "intent"),
    }
    templates = table(
        Template(name="plain", prompt="Text: {text}\nLabel:", lead=" "),
        Template(
            name="chat", prompt="{text}", chat=True, system="Classify the text and answer with nothing but its label."
        ),
    )

    def files(self, arguments: Sequence[str]) -> list[DataFile]:
        return [_with_folder(file) for file in find_files(arguments)]

    def rows_of(self, file: DataFile) -> Iterator[ClassifyRow | None]:
        """Yield the rows; the whole file is read at once only if its first row may be a header."""
        rows = super().rows_of(file)
        for first in rows:
            if first and _may_be_header(file, first):
                others = list(rows)
                _refuse_header(file, first, others)
                yield from (first, *others)
            else:
                yield first
                yield from rows

    def label_of(self, text: str, where: str) -> str:
        if len(text.splitlines()) != 1:  # generation stops at the end of a line
            raise DataError(f"{where}: a label must be one line, found {text[:60]!r}.", code="row.label-lines")
        return text

    def labels(self, rows: Sequence[ClassifyRow]) -> tuple[str, ...]:
        return tuple(sorted({row.label for row in rows}))

    def unlabelled(self, text: str, language: str) -> ClassifyRow:
        return ClassifyRow(text=text, label="", language=language)

    def labelled(self, row: ClassifyRow, answer: str) -> ClassifyRow:
        return replace(row, label=next(iter(answer.strip().splitlines()), "").strip())

    def agreement(self, rows: Sequence[ClassifyRow]) -> tuple[Metric, ...]:
        return self.metrics(rows)  # labels are the same in all languages
