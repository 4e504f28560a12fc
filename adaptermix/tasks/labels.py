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
from .data.tables import ROW_NAMES, Row, is_json, records, row_language, table_cells, usable
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

    The function reads the first line of an answer. It ignores case, and quotes and punctuation around the line, unless
    labels differ only in these.

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
    """Return the mean over labels of F1, from sums of (hit, spurious, missed), label after label.

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

    An answer that is not a label is wrong: it counts as missed for the right label, and as spurious for no label.

    Args:
        labels: All labels, each once.
        read: Function from an answer to its label, see `label_reader`.
    """
    offsets = {label: 3 * index for index, label in enumerate(labels)}

    def right(row: LabelledRow, answer: str) -> Sequence[float]:
        return read(answer) == row.label, 1

    def by_label(row: LabelledRow, answer: str) -> Sequence[float]:
        return label_counts(offsets, row.label, read(answer))

    return (
        Metric(name="accuracy", count=right, value=mean, ends=mean_ends),
        Metric(name="macro_f1", count=by_label, value=macro_f1, ends=f1_ends),
    )


def label_counts(offsets: Mapping[str, int], right: str, answered: str | None) -> list[float]:
    """Return the counts of one answer for `macro_f1`: (hit, spurious, missed), label after label.

    Args:
        offsets: Index of the first count of each label.
        right: The right label.
        answered: The label of the answer; None, or another text, for an answer that is not a label.
    """
    counts = [0.0] * (3 * len(offsets))
    if answered == right:
        counts[offsets[right]] = 1
        return counts
    counts[offsets[right] + 2] = 1
    if answered is not None and answered in offsets:
        counts[offsets[answered] + 1] = 1
    return counts


class LabelledTask(BaseTask[LR]):
    """A task whose rows are one or two texts and a label, in columns of a table or in JSONL.

    A subclass has `name`, `templates`, `row`, `columns` and `labels`.
    """

    row: type[LR]
    columns: Mapping[str, Sequence[str]]
    """For each text of a row, and for its `label`, the names that a column may have, the best first."""
    optional: Mapping[str, Sequence[str]] = {}
    """Likewise for texts that a row may lack."""
    spellings: Mapping[str, str] = {}
    """Further spellings of labels in answers."""

    @abstractmethod
    def labels(self, rows: Sequence[LR]) -> tuple[str, ...]:
        """Return the classes, in the order of a head's outputs."""

    def label_of(self, text: str, where: str) -> str | DataError | None:
        """Return the label for a text in a data file; None if there is no label, an error if the row is unusable."""
        return text

    def order_of(self, file: DataFile) -> tuple[str, ...]:
        """Return the fields in the order of the columns of a file without a header."""
        return tuple(self.columns)

    def rows_of(self, file: DataFile) -> Iterator[LR | None]:
        return usable(self._every_row(file))

    def _every_row(self, file: DataFile) -> Iterator[LR | DataError | None]:
        names = {**self.columns, **self.optional, **ROW_NAMES}
        for number, record in records(file, names, self.order_of(file), label="label", optional=self.optional):
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


def _may_be_header(file: DataFile, first: LabelledRow | None) -> bool:
    """Return whether a first row has one word in each of its columns."""
    if is_json(file) or first is None:
        return False
    words = [*first.texts, first.label]
    _, cells = next(table_cells(file))  # if they differ, the row is below a header
    return all(word.isidentifier() for word in words) and [cell.strip() for cell in cells] == words


class FreelyLabelledTask(LabelledTask[LR]):
    """A task whose labels are collected from its rows."""

    def rows_of(self, file: DataFile) -> Iterator[LR | None]:
        """Yield the rows; the whole file is read at once only if its first row may be a header."""
        rows = super().rows_of(file)
        for first in rows:
            if first and _may_be_header(file, first):
                others = list(rows)
                self._refuse_header(file, first, others)
                yield from (first, *others)
            else:
                yield first
                yield from rows

    def _refuse_header(self, file: DataFile, first: LR, rows: Sequence[LR | None]) -> None:
        """Refuse a first row that looks like a header with unknown column names: no other row has its label."""
        others = [row.label for row in rows if row]
        if len(others) > 1 and first.label not in others and len(set(others)) < len(others):
            cells = ", ".join(map(repr, (*first.texts, first.label)))
            names = " and ".join(repr(names[0]) for names in self.columns.values())
            raise DataError(
                f"{file.path}:1: labels must occur more than once, and the first row looks like a header: {cells}. "
                f"Name its columns {names}, or put such a header before it if it is data.",
                code="row.header-like",
            )

    def label_of(self, text: str, where: str) -> str | DataError | None:
        if len(text.splitlines()) != 1:  # generation stops at the end of a line
            raise DataError(f"{where}: a label must be one line, found {text[:60]!r}.", code="row.label-lines")
        return text

    def labels(self, rows: Sequence[LR]) -> tuple[str, ...]:
        return tuple(sorted({row.label for row in rows}))
