"""A head that tells the class of a text or of a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..head_forms import HEAD_FORMS
from ..models import BaseModel
from ..tasks import LabelTask, Task
from .base import cross_entropy, pad, told_cut


class ClassRows:
    """Texts with their classes.

    Args:
        base: A model with a head over the task's labels.
        task: The task.
        rows: Its rows.
        max_length: Longest row in tokens; of two texts the longer one is cut.
    """

    def __init__(self, base: BaseModel, task: LabelTask, rows: Sequence[Any], *, max_length: int) -> None:
        self._base, self._labels = base, base.labels
        texts = [task.segments(row) for row in rows]
        self._encoded = [base.tokenizer(*each, truncation=True, max_length=max_length) for each in texts]
        full = [place for place, row in enumerate(self._encoded) if len(row["input_ids"]) == max_length]
        cut = [
            task.language(rows[place])
            for place in full
            if len(base.tokenizer(*texts[place], verbose=False)["input_ids"]) > max_length
        ]
        self.notes = (told_cut(cut, len(rows), max_length, "their ends"),) if cut else ()
        self._gold = [task.answer(row) for row in rows]
        self.lengths = [len(row["input_ids"]) for row in self._encoded]
        self.texts = [[row] for row in self._encoded]

    def _logits(self, rows: Sequence[int]) -> Tensor:
        logits: Tensor = self._base.model(**pad(self._base, [self._encoded[row] for row in rows])).logits
        return logits

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of these rows' classes."""
        gold = torch.tensor([self._labels.index(self._gold[row]) for row in rows], device=self._base.device)
        return cross_entropy(self._logits(rows), gold)

    def terms(self, rows: Sequence[int]) -> int:
        """Return the number of rows."""
        return len(rows)

    def answers(self, rows: Sequence[int]) -> list[str]:
        """Return the label of the largest logit of each row."""
        return [self._labels[place] for place in self._logits(rows).argmax(-1).tolist()]


class Classes:
    """One label per row."""

    form = HEAD_FORMS["classes"]
    needs = "a task whose answers are labels"
    closed = True

    def suits(self, task: Task) -> bool:
        """Whether answers are labels."""
        return isinstance(task, LabelTask)

    def labels(self, task: LabelTask, rows: Sequence[Any]) -> tuple[str, ...]:
        """Return the labels of these rows, or those that the task has fixed."""
        return task.labels(rows)

    def encode(
        self,
        base: BaseModel,
        task: LabelTask,
        rows: Sequence[Any],
        *,
        max_length: int,
        teach: bool = False,  # noqa: ARG002  (there is nothing to pass over)
    ) -> ClassRows:
        """Encode texts; see `ClassRows`."""
        return ClassRows(base, task, rows, max_length=max_length)
