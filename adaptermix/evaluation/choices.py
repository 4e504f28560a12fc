"""Answers that a language model chooses by their likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..models.base import BaseModel
from ..models.likelihood import log_likelihoods
from ..progress import Watcher
from ..tasks import ChoiceTask, Template
from ..tasks.data.tables import Row


class Choices:
    """The options of rows, as texts after their prompts.

    Args:
        base: The model.
        task: The task.
        rows: Its rows.
        template: The prompt template.

    Attributes:
        longest: Most tokens of an option.
    """

    def __init__(self, base: BaseModel, task: ChoiceTask, rows: Sequence[Row], template: Template) -> None:
        self._base, self._task, self._rows = base, task, rows
        texts = [[template.text_of(option, task.fields(row)) for option in task.options(row)] for row in rows]
        self._lengths = [list(map(len, options)) for options in texts]
        # The token that ends an answer is not part of it here: it would be one more token of every option.
        self._endings = [[template.encode_answer(text, base.tokenizer)[:-1] for text in options] for options in texts]
        self.longest = max((len(ending) for options in self._endings for ending in options), default=1)

    def cut(self, most: int) -> None:
        """Shorten each option to this many tokens, so that it fits the model's positions."""
        self._endings = [[ending[:most] for ending in options] for options in self._endings]

    def answers(
        self,
        indices: Sequence[int],
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int,
        before: Callable[[Sequence[int]], None],
        watch: Watcher,
        label: str,
    ) -> list[str]:
        """Return the answers to rows by their numbers, which have these prompts; see `log_likelihoods`."""
        endings = [self._endings[index] for index in indices]
        scores = log_likelihoods(
            self._base, prompts, endings, batch_size=batch_size, before=before, watch=watch, label=label
        )
        return [
            self._task.answer_from_scores(self._rows[index], each, self._lengths[index])
            for index, each in zip(indices, scores, strict=True)
        ]
