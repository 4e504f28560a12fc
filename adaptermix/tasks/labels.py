"""Answers that are labels: how they are read, and accuracy and macro F1 over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from .metrics import Metric, Sums, f1_ends, mean, mean_ends

# what models put around a label; signs that may tell labels apart (C, C++) are not among them
_AROUND = " \t.,:;!?\"'`*()[]“”„«»。"


class Labelled(Protocol):
    """A row with a label."""

    @property
    def label(self) -> str:
        """The right answer."""


def _bare(text: str) -> str:
    return text.strip(_AROUND).casefold()


def label_reader(labels: Sequence[str], spellings: Mapping[str, str] | None = None) -> Callable[[str], str | None]:
    """Return what reads the label out of an answer, or None where it is none of them.

    Only the answer's first line counts. Quotes and stops around it and its case do not count, unless labels differ in
    nothing else.

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

    Labels of no row are left out. In [0, 1], as scikit-learn's `f1_score` with `average="macro"`, the labels of the
    rows as `labels`, and 0 for a division by zero.

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

    An answer that is no label is wrong, and counts as missed for the right label and as spurious for none.

    Args:
        labels: All labels, each once.
        read: From an answer to its label, see `label_reader`.
    """
    places = {label: 3 * place for place, label in enumerate(labels)}

    def right(row: Labelled, answer: str) -> Sequence[float]:
        return read(answer) == row.label, 1

    def by_label(row: Labelled, answer: str) -> Sequence[float]:
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
