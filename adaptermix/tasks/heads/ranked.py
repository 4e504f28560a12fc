"""Queries with documents for a classification head, which ranks them by their expected relevance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import DataError, PlanError
from ...models.base import BaseModel
from .. import RankingTask
from ..data.report import by_language
from ..data.tables import Row
from .base import IGNORED, Features, cross_entropy, cut_languages, cut_warning, pad


class RankedRows:
    """Queries, each read with every document.

    Args:
        base: A model with a head over grades of relevance.
        task: The task.
        rows: Its rows.
        max_length: Longest text in tokens; of query and document the longer one is cut.
        teach: Whether the loss is needed.

    Raises:
        DataError: the loss is needed, and no document has a grade of the head.
        PlanError: a label of the head is not a number.
    """

    def __init__(
        self, base: BaseModel, task: RankingTask, rows: Sequence[Row], *, max_length: int, teach: bool = False
    ) -> None:
        self._base, self._task, self._rows = base, task, rows
        if odd := [label for label in base.labels if not label.isdecimal()]:
            raise PlanError(
                f"a head that ranks must have grades as labels, whole numbers, and this one has {odd[0]!r}.",
                code="head.no-grades",
            )
        self._grades = torch.tensor([float(label) for label in base.labels], device=base.device)
        pairs = [task.candidates(row) for row in rows]
        self.texts: Sequence[Sequence[Features]] = [
            base.encode(each, [task.language(row)] * len(each), truncation=True, max_length=max_length)
            for row, each in zip(rows, pairs, strict=True)
        ]
        self.lengths = [sum(len(text["input_ids"]) for text in texts) for texts in self.texts]
        known = {label: index for index, label in enumerate(base.labels)}
        self._gold = [[known.get(grade, IGNORED) for grade in task.grades(row)] for row in rows]
        self.notes = tuple(filter(None, [self._cut(max_length), self._unknown() if teach else None]))

    def _cut(self, max_length: int) -> str | None:
        pairs = [(pair, self._task.language(row)) for row in self._rows for pair in self._task.candidates(row)]
        texts, languages = zip(*pairs, strict=True) if pairs else ((), ())
        encoded = [text for texts_of_row in self.texts for text in texts_of_row]
        cut = cut_languages(self._base, texts, languages, encoded, max_length)
        return cut_warning(cut, len(encoded), max_length, "their ends", "documents") if cut else None

    def _unknown(self) -> str | None:
        new = [
            self._task.language(row)
            for row, gold in zip(self._rows, self._gold, strict=True)
            for grade in gold
            if grade == IGNORED
        ]
        total = sum(map(len, self._gold))
        if len(new) == total:
            raise DataError(
                f"documents must have grades that the head has ({', '.join(self._base.labels)}), and none has.",
                code="head.no-label",
            )
        if not new:
            return None
        return f"{by_language(new, total)} documents have grades that the head does not have; the loss ignores them."

    def _logits(self, texts: Sequence[Features]) -> Tensor:
        logits: Tensor = self._base.model(**pad(self._base, texts)).logits
        return logits

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of the grades of all documents of these rows, in one pass."""
        gold = torch.tensor([grade for row in rows for grade in self._gold[row]], device=self._base.device)
        return cross_entropy(self._logits([text for row in rows for text in self.texts[row]]), gold)

    def terms(self, rows: Sequence[int]) -> int:
        """Return the number of documents whose grades the head has."""
        return sum(grade != IGNORED for row in rows for grade in self._gold[row])

    def answers(self, rows: Sequence[int]) -> list[str]:
        """Return the expected relevance of the documents of each row."""
        texts = [text for row in rows for text in self.texts[row]]
        relevance: list[float] = []
        for start in range(0, len(texts), len(rows)):  # queries fill no larger batches than single texts
            chances = self._logits(texts[start : start + len(rows)]).float().softmax(-1)
            relevance += (chances @ self._grades).tolist()
        each = iter(relevance)
        return [
            self._task.answer_from_relevance(self._rows[row], [next(each) for _ in self.texts[row]]) for row in rows
        ]
