"""A head that classifies texts or pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import DataError
from ...models.base import BaseModel
from ...models.head_forms import HEAD_FORMS
from .. import LabelTask, RankingTask, Task
from ..data.report import by_language
from ..data.tables import Row
from .base import IGNORED, HeadRows, cross_entropy, cut_languages, cut_warning, pad
from .ranked import RankedRows

_WRONG = "every answer to them is wrong"


class ClassRows:
    """Texts with their classes.

    Args:
        base: A model with a head over the task's labels.
        task: The task.
        rows: Its rows.
        max_length: Longest row in tokens; of two texts the longer one is cut.
        teach: Whether the loss is needed.

    Raises:
        DataError: the loss is needed, and no row has a label of the head.
    """

    def __init__(
        self, base: BaseModel, task: LabelTask, rows: Sequence[Row], *, max_length: int, teach: bool = False
    ) -> None:
        self._base, self._labels = base, base.labels
        texts = [task.segments(row) for row in rows]
        languages = list(map(task.language, rows))
        self._encoded = base.encode(texts, languages, truncation=True, max_length=max_length)
        cut = cut_languages(base, texts, languages, self._encoded, max_length)
        notes = [cut_warning(cut, len(rows), max_length, "their ends")] if cut else []
        known = {label: index for index, label in enumerate(self._labels)}
        self._gold = [known.get(task.answer(row), IGNORED) for row in rows]
        # rows with an empty label are answered, not scored
        new = [row for row, gold in zip(rows, self._gold, strict=True) if gold == IGNORED and task.answer(row)]
        if new:
            notes.append(
                f"{by_language([task.language(row) for row in new], len(rows))} rows have labels that the head does "
                f"not have, such as {task.answer(new[0])[:40]!r}; {'the loss passes over them' if teach else _WRONG}."
            )
        if teach and len(new) == len(rows):
            raise DataError(
                f"rows must have labels that the head has ({', '.join(self._labels)}), and none has.",
                code="head.no-label",
            )
        self.notes = tuple(notes)
        self.lengths = [len(row["input_ids"]) for row in self._encoded]
        self.texts = [[row] for row in self._encoded]

    def _logits(self, rows: Sequence[int]) -> Tensor:
        logits: Tensor = self._base.model(**pad(self._base, [self._encoded[row] for row in rows])).logits
        return logits

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of these rows' classes."""
        gold = torch.tensor([self._gold[row] for row in rows], device=self._base.device)
        return cross_entropy(self._logits(rows), gold)

    def terms(self, rows: Sequence[int]) -> int:
        return sum(self._gold[row] != IGNORED for row in rows)

    def predictions(self, rows: Sequence[int]) -> list[Tensor]:
        return list(self._logits(rows).float().log_softmax(-1).unsqueeze(1))

    def answers(self, rows: Sequence[int]) -> list[str]:
        return [self._labels[index] for index in self._logits(rows).argmax(-1).tolist()]


class Classes:
    """One label per row."""

    form = HEAD_FORMS["classes"]
    needs = "a task whose answers are labels, or ranks of documents"
    closed = True

    def suits(self, task: Task) -> bool:
        return isinstance(task, LabelTask | RankingTask)

    def labels(self, task: LabelTask | RankingTask, rows: Sequence[Row]) -> tuple[str, ...]:
        return task.labels(rows)

    def encode(
        self,
        base: BaseModel,
        task: LabelTask | RankingTask,
        rows: Sequence[Row],
        *,
        max_length: int,
        teach: bool = False,
    ) -> HeadRows:
        """Encode texts; see `ClassRows` and `RankedRows`."""
        if isinstance(task, RankingTask):
            return RankedRows(base, task, rows, max_length=max_length, teach=teach)
        return ClassRows(base, task, rows, max_length=max_length, teach=teach)
