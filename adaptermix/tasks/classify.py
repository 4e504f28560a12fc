"""Text classification: TSV, CSV and JSONL, and trees with one folder per language such as NusaX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .base import task
from .data.files import DataFile
from .labels import FreelyLabelledTask, LabelledRow
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


def _with_folder(file: DataFile) -> DataFile:
    code = _FOLDERS.get(file.path.absolute().parent.name.lower())
    return file if file.languages or code is None else replace(file, languages=(code,))


@task
class Classify(FreelyLabelledTask[ClassifyRow]):
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
    text_field = "text"
    blank = {"label": "-"}
    row = ClassifyRow
    columns = {
        "text": ("text", "sentence", "tweet", "review", "utterance", "utt"),
        "label": ("label", "sentiment", "category", "class", "intent"),
    }
    templates = table(
        Template(name="plain", prompt="Text: {text}\nLabel:", lead=" "),
        Template(
            name="chat", prompt="{text}", chat=True, system="Classify the text and answer with nothing but its label."
        ),
    )

    def files(self, arguments: Sequence[str]) -> list[DataFile]:
        return [_with_folder(file) for file in super().files(arguments)]

    def unlabelled(self, text: str, language: str) -> ClassifyRow:
        return ClassifyRow(text=text, label="", language=language)

    def labelled(self, row: ClassifyRow, answer: str) -> ClassifyRow:
        return replace(row, label=next(iter(answer.strip().splitlines()), "").strip())

    def agreement(self, rows: Sequence[ClassifyRow]) -> tuple[Metric, ...]:
        return self.metrics(rows)  # labels are the same in all languages
