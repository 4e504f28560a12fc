"""Tasks whose answers are labels: rows of tables, reading labels from answers, accuracy and macro F1."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..errors import DataError
from .base import BaseTask
from .data.files import DataFile
from .data.tables import ROW_NAMES, Row, records, row_language, usable
from .metrics import Metric, Sums, f1_ends, mean, mean_ends

# Models put these around a label. Signs that may distinguish labels (C, C++) are not among them.
_AROUND = " \t.,:;!?\"'`*()[]“”„«»。"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRow(Row):
    """A row with a label.

    Args:
        label: The right answer, one line of text.
    """

    label: str


LR = TypeVar("LR", bound=LabelledRow)


def _bare(text: str) -> str:
    return text.strip(_AROUND).casefold()


def label_reader(labels: Sequence[str], spellings: Mapping[str, str] | None = None) -> Callable[[str], str | None]:
    """Return a function from an answer to its label, or to None if the answer is not a label.

    It reads the answer's first line and ignores case, and quotes and stops around it, unless labels differ in nothing
    else.

    Args:
        labels: All labels.
        spellings: Further spellings of them.

    Example:
        >>> read = label_reader(["positive", "negative"])
        >>> read("Positive."), read("not positive")
        ('positive', None)
    """
    exact = {label: label for label in labels} | dict(spellings or {})
    bare = Counter(map(_bare, exact))
    loose = {_bare(written): label for written, label in exact.items() if _bare(written) and bare[_bare(written)] == 1}

    def read(answer: str) -> str | None:
        line = next(iter(answer.strip().splitlines()), "").strip()
        return exact.get(line) or loose.get(_bare(line))

    return read


def macro_f1(sums: Sums) -> Sums:
    """Return the mean over labels of F1, from sums of (hit, spurious, missed) of each label in turn.

    Labels that no row has are left out. In [0, 1], as scikit-learn's `f1_score` with `average="macro"`, the labels of
    the rows as `labels`, and `zero_division=0`.

    Shapes: [... 3 * labels] gives [...].
    """
    counts = sums.reshape(*sums.shape[:-1], sums.shape[-1] // 3, 3)
    hit, spurious, missed = counts[..., 0], counts[..., 1], counts[..., 2]
    occurs = hit + missed > 0
    each = 2 * hit / np.where(occurs, 2 * hit + spurious + missed, 1.0)
    values: Sums = np.where(occurs, each, 0.0).sum(-1) / np.maximum(occurs.sum(-1), 1)
    return values


def label_metrics(labels: Sequence[str], read: Callable[[str], str | None]) -> tuple[Metric, ...]:
    """Return accuracy and macro F1.

    An answer that is not a label is wrong: it counts as missed for the right label, and as spurious for none.

    Args:
        labels: All labels, each once.
        read: Function from an answer to its label, see `label_reader`.
    """
    places = {label: 3 * place for place, label in enumerate(labels)}

    def right(row: LabelledRow, answer: str) -> Sequence[float]:
        return read(answer) == row.label, 1

    def by_label(row: LabelledRow, answer: str) -> Sequence[float]:
        counts = [0.0] * (3 * len(places))
        found = read(answer)
        if found == row.label:
            counts[places[found]] = 1
            return counts
        counts[places[row.label] + 2] = 1
        if found in places:
            counts[places[found] + 1] = 1
        return counts

    return (
        Metric(name="accuracy", count=right, value=mean, ends=mean_ends),
        Metric(name="macro_f1", count=by_label, value=macro_f1, ends=f1_ends),
    )


class LabelledTask(BaseTask[LR]):
    """A task whose rows are one or two texts and a label, in columns of a table or in JSONL.

    A subclass has `name`, `templates`, `row`, `columns` and `labels`.
    """

    row: type[LR]
    columns: Mapping[str, Sequence[str]]
    """For each text of a row, and for its `label`, the names that a column may have, the best first."""
    spellings: Mapping[str, str] = {}
    """Further spellings of labels in answers."""

    @abstractmethod
    def labels(self, rows: Sequence[LR]) -> tuple[str, ...]:
        """Return the classes, in the order of a head's outputs."""

    def label_of(self, text: str, where: str) -> str | DataError | None:
        """Return the label that a data file has; None for rows without one, a fault if the row cannot be used."""
        return text

    def rows_of(self, file: DataFile) -> Iterator[LR | None]:
        return usable(self._every_row(file))

    def _every_row(self, file: DataFile) -> Iterator[LR | DataError | None]:
        for number, record in records(file, {**self.columns, **ROW_NAMES}, order=tuple(self.columns), label="label"):
            label = self.label_of(record.pop("label"), f"{file.path}:{number}") if record else None
            if record is not None and isinstance(label, str):
                language = row_language(file, record.pop("language", None))
                yield self.row(**record, label=label, language=language)
            else:
                yield label if isinstance(label, DataError) else None

    def segments(self, row: LR) -> tuple[str, ...]:
        return row.texts

    def fields(self, row: LR) -> Mapping[str, str]:
        return {name: getattr(row, name) for name in self._text_columns()}

    def answer(self, row: LR) -> str:
        return row.label

    def with_source(self, row: LR, source: LR) -> LR:
        return replace(row, **{name: f"{getattr(source, name)} {getattr(row, name)}" for name in self._text_columns()})

    def metrics(self, rows: Sequence[LR]) -> tuple[Metric, ...]:
        labels = self.labels(rows)
        return label_metrics(labels, label_reader(labels, self.spellings))

    def _text_columns(self) -> list[str]:
        return [name for name in self.columns if name != "label"]
