"""Text classification: the answer, or the class, is the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .data import ClassifyRow, DataFile, read_classify
from .labels import label_metrics, label_reader
from .metrics import Metric
from .prompts import Template, table


class Classify:
    """Text classification, scored by accuracy.

    Accuracy is the headline metric because it is the same sum over rows whatever labels a set of rows happens to hold,
    so that languages and resamples compare. `macro_f1` stands beside it, since NusaX reports it (Winata et al., NusaX,
    EACL 2023, arXiv 2205.15960): the mean over labels of F1, over the labels that a language's gold rows hold. An
    answer that is no label of any row is wrong.
    """

    name = "classify"
    one_line = True
    is_open = False
    templates: Mapping[str, Template] = table(
        Template(name="plain", prompt="Text: {text}\nLabel:", lead=" "),
        Template(
            name="chat", prompt="{text}", chat=True, system="Classify the text and answer with nothing but its label."
        ),
    )

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[list[ClassifyRow], list[DataFile]]:
        """Read labelled texts; see `adaptermix.tasks.data.classify`."""
        return read_classify(arguments, rows=rows)

    def fields(self, row: ClassifyRow) -> Mapping[str, str]:
        """Return the text."""
        return {"text": row.text}

    def segments(self, row: ClassifyRow) -> tuple[str, ...]:
        """Return the text."""
        return (row.text,)

    def joined(self, row: ClassifyRow, source: ClassifyRow) -> ClassifyRow:
        """Return a row whose text begins with that of its source."""
        return replace(row, text=f"{source.text} {row.text}")

    def labels(self, rows: Sequence[ClassifyRow]) -> tuple[str, ...]:
        """Return the labels of these rows, sorted."""
        return tuple(sorted({row.label for row in rows}))

    def texts(self, row: ClassifyRow) -> tuple[str, ...]:
        """Return the text."""
        return (row.text,)

    def answer(self, row: ClassifyRow) -> str:
        """Return the label."""
        return row.label

    def evidence(self, row: ClassifyRow) -> tuple[str, ...]:  # noqa: ARG002
        """Return nothing: a part of the text may be enough for the answer."""
        return ()

    def language(self, row: ClassifyRow) -> str:
        """Return the text's language."""
        return row.language

    def metrics(self, rows: Sequence[ClassifyRow]) -> tuple[Metric, ...]:
        """Return accuracy and macro F1 over the labels of these rows."""
        labels = self.labels(rows)
        return label_metrics(labels, label_reader(labels))

    def unlabelled(self, text: str, language: str) -> ClassifyRow:
        """Return a row with an empty label."""
        return ClassifyRow(text=text, label="", language=language)

    def labelled(self, row: ClassifyRow, answer: str) -> ClassifyRow:
        """Return the row with the first line of an answer as its label."""
        return replace(row, label=next(iter(answer.strip().splitlines()), "").strip())

    def agreement(self, rows: Sequence[ClassifyRow]) -> tuple[Metric, ...]:
        """Return accuracy and macro F1: labels are the same in all languages."""
        return self.metrics(rows)
