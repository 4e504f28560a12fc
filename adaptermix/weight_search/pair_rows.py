"""Parallel sentences as rows of a task without labels: the task adapter's own answers serve as labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import PlanError, UsageError
from ..tasks import ComparableTask, Metric, Task
from ..tasks.base import require_comparable
from ..tasks.data import Pair
from ..tasks.data.tables import Row

_KEPT = 0.5
"""The source side must reach this share of the way from a constant answer's score to the task adapter's own."""
_CONSTANTS = 20
"""Most constant answers to try, starting with the most frequent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """Both sides of parallel pairs as rows of a task.

    The second side of a pair, usually English, is the *source side*: the task adapter alone answers it, and its answer
    is the label of both sides. The source sides are rows too, so a candidate that changes their answers scores less.

    Args:
        task: The task.
        rows: The distinct source sides, then the other sides.
        teachers: For each row the index of the row whose answer is its label.
        sources: The languages of the source sides.
    """

    task: ComparableTask
    rows: Sequence[Row]
    teachers: Sequence[int]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, task: Task, pairs: Sequence[Pair]) -> PairRows:
        """Return the rows of pairs.

        Raises:
            UsageError: the task's answers cannot be compared across languages, or it asks about more than one text; a
                language is on both sides.
        """
        task = require_comparable(task)
        sources = {pair.languages[1] for pair in pairs}
        if both := sorted(sources & {pair.languages[0] for pair in pairs}):
            raise UsageError(
                f"the second side of every pair must be in the task adapter's own language, and '{both[0]}' is on both "
                "sides. Leave the files out whose sides are the other way round, or name them such as de-en=FILE.",
                code="agreement.language",
            )
        numbers: dict[tuple[str, str], int] = {}
        for pair in pairs:
            numbers.setdefault((pair.languages[1], pair.target), len(numbers))
        teachers = [numbers[pair.languages[1], pair.target] for pair in pairs]
        return cls(
            task=task,
            rows=[
                *(task.unlabelled(text, language) for language, text in numbers),
                *(task.unlabelled(pair.source, pair.languages[0]) for pair in pairs),
            ],
            teachers=[*range(len(numbers)), *teachers],
            sources=tuple(sorted(sources)),
        )

    @property
    def source_rows(self) -> range:
        """The indices of the source sides."""
        return range(len(set(self.teachers)))

    @property
    def clusters(self) -> list[str] | None:
        """The cluster of each row, None if every row is its own cluster.

        Several translations of one sentence into one language share its label, and are right or wrong together.
        """
        named = [(self.task.language(row), teacher) for row, teacher in zip(self.rows, self.teachers, strict=True)]
        return [f"sentence {teacher}" for _, teacher in named] if len(set(named)) < len(named) else None

    @property
    def aligned(self) -> tuple[str, ...]:
        """The languages of the other sides."""
        return tuple(sorted({self.task.language(row) for row in self.rows} - set(self.sources)))

    def labelled(self, answers: Sequence[str | None]) -> list[Row]:
        """Return the rows with the task adapter's answers (at least to the source sides) as their right answers."""
        # Stored answers are plain text, so tags and spans of computed ones are not used either.
        return [
            self.task.labelled(row, str(answers[teacher] or ""))
            for row, teacher in zip(self.rows, self.teachers, strict=True)
        ]

    def floors(self, metric: Metric, answers: Sequence[str | None]) -> dict[str, float]:
        r"""Return the score on each source language below which a candidate has lost the task.

        It is $(s + c) / 2$, where $s$ is the score of the task adapter's own answers (1, unless some are empty) and $c$
        the best score of one constant answer to all sentences. So a candidate whose answers do not depend on the
        sentence is below it, however frequent its answer is.

        Args:
            metric: Compares answers.
            answers: The task adapter's answers, at least to the source sides.

        Raises:
            PlanError: the task adapter itself gives the same answer to all sentences of a language, or none.
        """
        rows = self.labelled(answers)
        floors = {}
        for language in self.sources:
            indices = [index for index in self.source_rows if self.task.language(rows[index]) == language]
            subset, texts = [rows[index] for index in indices], [str(answers[index] or "") for index in indices]
            if len(subset) < 2:
                raise PlanError(
                    f"agreement needs at least two different sentences in '{language}', and the pairs have one. "
                    "Give more pairs.",
                    code="agreement.too-few",
                )
            common = Counter(texts).most_common(_CONSTANTS)
            constant = max(_score(metric, subset, [text] * len(subset)) for text, _ in common)
            itself = _score(metric, subset, texts)
            if constant >= itself:
                raise PlanError(
                    "agreement needs a task adapter that answers sentences differently, and the first adapter answers "
                    f"all {len(subset)} sentences in '{language}' with {common[0][0][:40]!r}. Give pairs of "
                    "the task's domain, or choose on labelled rows.",
                    code="agreement.constant",
                )
            floors[language] = constant + _KEPT * (itself - constant)
        return floors


def _score(metric: Metric, rows: Sequence[Row], answers: Sequence[str]) -> float:
    each = map(metric.count, rows, answers)
    counts = [counted for counted in each if counted is not None]
    return float(metric.value(np.sum(np.asarray(counts, dtype=np.float64), axis=0)))
