"""A loaded model's answers, generated or from its head. Rows are encoded a single time for all calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..errors import UsageError
from ..models.base import BaseModel
from ..models.batch_size import USUAL, rows_that_fit
from ..models.generate import Limits, generate_ids, in_words
from ..models.positions import positions_of
from ..options import GenerationSettings
from ..progress import SILENT, Watcher
from ..tasks import ChoiceTask, Task, get_template
from ..tasks.data.prompt_ids import PromptIds
from ..tasks.data.report import by_language
from ..tasks.data.tables import Row
from ..tasks.heads import HEADS, HeadRows
from ..tasks.heads.base import LONGEST, longest, tokens_of
from .choices import Choices
from .head_answers import answers_of_head

T = TypeVar("T")

_WORTH = 0.6
"""Use drafts only if at least this share of answers was unchanged in the previous call."""


class Answering:
    """Rows for a model to answer.

    Args:
        base: The model; its adapters may change between calls.
        task: The task.
        rows: Its rows.
        settings: Generation settings, and rows per batch.
        template: Name of the prompt template.
        watch: Receives progress, and notes about encoding.

    Attributes:
        before: Called before each run of passes with the rows in them, in batch order.
        longest: Most tokens of a row for a model with a head.

    Raises:
        DataError: a row lacks a field that the model's head reads.
        UsageError: the settings have a template or generation options, and the model has a head.
    """

    def __init__(
        self,
        base: BaseModel,
        task: Task,
        rows: Sequence[Row],
        settings: GenerationSettings,
        *,
        template: str,
        watch: Watcher = SILENT,
    ) -> None:
        self._base, self._task, self._rows, self._settings, self._watch = base, task, rows, settings, watch
        self._encoded: HeadRows | None = None
        self._size = settings.batch_size
        self._drafts: dict[int, list[int]] = {}
        self._unchanged = 1.0
        self.longest = LONGEST
        self.before: Callable[[Sequence[int]], None] = lambda _rows: None
        if base.head:
            if settings.template:
                raise UsageError("the adapter's head reads no prompt: drop --template.", code="head.no-template")
            if settings.max_new_tokens != GenerationSettings.model_fields["max_new_tokens"].default:
                raise UsageError(
                    "the adapter's head generates nothing: drop --max-new-tokens.", code="head.no-new-tokens"
                )
            self.longest = longest(base)
            self._encoded = HEADS[base.head.form.name].encode(base, task, rows, max_length=self.longest)
            for note in self._encoded.notes:
                watch.note(note)
            return
        chosen = get_template(task, template)
        self._end = chosen.end(base.tokenizer)
        self._ids = PromptIds(tokenizer=base.tokenizer, mixed=base.mixed)
        self._prompts = [self._ids.encode(chosen, task.fields(row), task.language(row)) for row in rows]
        self._most = settings.max_new_tokens
        self._choices = Choices(base, task, rows, chosen) if isinstance(task, ChoiceTask) else None
        if self._choices:
            if settings.max_new_tokens != GenerationSettings.model_fields["max_new_tokens"].default:
                raise UsageError(
                    f"task '{task.name}' compares given answers and generates nothing: drop --max-new-tokens.",
                    code="choice.no-new-tokens",
                )
            self._most = self._choices.longest
        if (limit := positions_of(base.model)) is not None:
            self._fit(limit)

    def _fit(self, limit: int) -> None:
        """Truncate prompts so that prompt and answer fit the model's positions, at most half of them for the answer."""
        room = max(limit - self._most, (limit + 1) // 2)
        long = [index for index, prompt in enumerate(self._prompts) if len(prompt) > room]
        if self._choices:
            self._choices.cut(limit - room)
        for index in long:
            self._prompts[index] = self._ids.shortened(self._prompts[index], room)
        if long:
            languages = [self._task.language(self._rows[index]) for index in long]
            self._watch.note(
                f"{by_language(languages, len(self._prompts))} prompts are longer than {room} tokens and lose their "
                f"beginning: this base model has {limit} positions, also for the answer (--max-new-tokens)."
            )
        self._most = min(self._most, max(1, limit - max(map(len, self._prompts), default=0)))

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def prompts(self) -> list[list[int]]:
        """Return the token ids of each row's prompt, or for a head of its texts, which may be several."""
        return [[len(prompt)] for prompt in self._prompts] if self._encoded is None else tokens_of(self._encoded)

    @property
    def generates(self) -> bool:
        """Whether answers are generated, rather than computed by a head."""
        return self._encoded is None

    def __call__(self, label: str = "answer", *, indices: Sequence[int] | None = None) -> list[str]:
        """Return one answer per row.

        Generation uses the previous call's answers as drafts if most were unchanged then; see `generate_ids`.

        Args:
            label: Name of the progress bar.
            indices: Indices of the rows, in this order; default all.
        """
        if self._encoded:
            size = self._settings.batch_size or USUAL
            return answers_of_head(
                self._encoded, batch_size=size, indices=indices, before=self.before, watch=self._watch, label=label
            )
        return self.together([range(len(self._prompts)) if indices is None else indices], lambda _batch: None, label)[0]

    def together(
        self, requests: Sequence[Sequence[int]], choose: Callable[[Sequence[int]], None], label: str
    ) -> list[list[str]]:
        """Return generated answers for several adapters that share the passes, each on its list of rows.

        Args:
            requests: Indices of the rows, per adapter.
            choose: Called before passes with the adapter's number for each row of the batch.
            label: Name of the progress bar.
        """
        owners = [number for number, indices in enumerate(requests) for _ in indices]
        rows = [index for indices in requests for index in indices]

        def prepare(batch: Sequence[int]) -> None:
            choose([owners[row] for row in batch])
            self.before([rows[row] for row in batch])

        prompts = [self._prompts[index] for index in rows]
        options: dict[str, Any] = {"before": prepare, "watch": self._watch, "label": label}
        if self._choices:
            choices = self._choices
            chosen = iter(self._fitting(lambda size: choices.answers(rows, prompts, batch_size=size, **options)))
            return [[next(chosen) for _ in indices] for indices in requests]
        answers = self._generated(
            prompts,
            drafts=[self._drafts.get(index) for index in rows] if self._unchanged >= _WORTH else None,
            **options,
        )
        before = [(self._drafts[index], ids) for index, ids in zip(rows, answers, strict=True) if index in self._drafts]
        if before:
            self._unchanged = sum(draft == ids for draft, ids in before) / len(before)
        self._drafts |= dict(zip(rows, answers, strict=True))
        words = iter(in_words(self._base, answers))
        return [[next(words) for _ in indices] for indices in requests]

    def _generated(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        limits = Limits(max_new_tokens=self._most, one_line=self._task.one_line, ends=[self._end])
        return self._fitting(lambda size: generate_ids(self._base, prompts, limits, batch_size=size, **options))

    def _fitting(self, run: Callable[[int], T]) -> T:
        """Run with the largest batches that fit; after running out of memory, with half as many rows."""
        self._size = self._size or rows_that_fit(self._base, max(map(len, self._prompts), default=0) + 2 * self._most)
        while True:
            try:
                return run(self._size)
            except torch.OutOfMemoryError:
                if self._settings.batch_size or self._size == 1:
                    raise
            self._size //= 2
            torch.cuda.empty_cache()
