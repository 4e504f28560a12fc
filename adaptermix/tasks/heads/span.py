"""A head that points at the answer in a text: its first and its last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import DataError, PlanError
from ...models.base import BaseModel
from ...models.head_forms import HEAD_FORMS
from .. import SpanTask, Task
from ..data.tables import Row
from .base import IGNORED, cross_entropy, pad

OVERLAP = 128
"""Most tokens that neighbouring windows share, as in BERT's script for SQuAD."""
LONGEST_ANSWER = 30
"""Tokens of the longest answer that is considered, as there."""
SPAN, UNANSWERABLE = "span", "unanswerable"
Characters = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A question with a part of its text.

    Args:
        features: Inputs of the model.
        spans: Characters of the text per token; None for tokens outside of the text.
        null: The token that stands for "no answer here".
    """

    features: dict[str, list[int]]
    spans: list[Characters | None]
    null: int

    def tokens_of(self, span: Characters | None) -> tuple[int, int]:
        """Return the first and last token of characters of the text, or twice `null` if they are not all here."""
        inside = [(index, characters) for index, characters in enumerate(self.spans) if characters]
        if span is None or not inside:
            return self.null, self.null
        touched = [index for index, (start, end) in inside if end > span[0] and start < span[1]]
        whole = inside[0][1][0] <= span[0] and span[1] <= inside[-1][1][1]
        return (touched[0], touched[-1]) if touched and whole else (self.null, self.null)


def cut_windows(base: BaseModel, question: str, context: str, max_length: int, language: str = "") -> list[Window]:
    """Return windows of at most `max_length` tokens that together hold the whole text.

    A question takes at most half of a window. Neighbours share 128 tokens, or half of the rest if that is less.

    Raises:
        PlanError: the text gets no token.
    """
    tokenizer = base.tokenizer
    (encoded,) = base.encode([question], [language], add_special_tokens=False, return_offsets_mapping=True)
    most = max(1, max_length // 2)
    if len(encoded["input_ids"]) > most:
        question = question[: encoded["offset_mapping"][most - 1][1]]
    room = max_length - min(most, len(encoded["input_ids"])) - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise PlanError(
            f"--max-length must leave room for a question and a part of its text, got {max_length}.",
            code="head.max-length",
        )
    (cut,) = base.encode(
        [(question, context)],
        [language],
        truncation="only_second",
        max_length=max_length,
        stride=max(0, min(OVERLAP, room // 2)),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = [name for name in tokenizer.model_input_names if name in cut]
    windows = []
    for number, ids in enumerate(cut["input_ids"]):
        sides = cut.sequence_ids(number)
        spans = [
            tuple(characters) if side == 1 and characters[0] < characters[1] else None
            for side, characters in zip(sides, cut["offset_mapping"][number], strict=True)
        ]
        marks = [index for index, token in enumerate(ids) if token == tokenizer.cls_token_id]
        features = {name: cut[name][number] for name in names}
        windows.append(Window(features=features, spans=spans, null=marks[0] if marks else 0))
    return windows


def best_span(
    starts: Float[Tensor, " tokens"], ends: Float[Tensor, " tokens"], allowed: Sequence[bool]
) -> tuple[float, int, int]:
    """Return score, first and last token of the best answer: start + end logits, start <= end, at most 30 tokens.

    Args:
        starts: Start logits.
        ends: End logits.
        allowed: Whether an answer may start or end at a token; at least one is allowed.
    """
    barred = torch.tensor([not each for each in allowed], device=starts.device)
    both = starts.float().masked_fill(barred, -torch.inf)[:, None] + ends.float().masked_fill(barred, -torch.inf)
    band = torch.ones_like(both, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    both = both.masked_fill(~band, -torch.inf)
    index = int(both.argmax())
    return float(both.flatten()[index]), index // len(allowed), index % len(allowed)


class SpanRows:
    """Questions on texts, in windows.

    Args:
        base: A model with a span head, and a fast tokenizer.
        task: The task.
        rows: Its rows.
        max_length: Longest window in tokens.
        teach: Whether the loss is needed.

    Raises:
        DataError: the loss is needed, and no answer occurs in its text, or whole in a window.
    """

    def __init__(
        self, base: BaseModel, task: SpanTask, rows: Sequence[Row], *, max_length: int, teach: bool = False
    ) -> None:
        self._base, self._task, self._rows = base, task, rows
        self._windows = [
            cut_windows(base, *task.question_and_context(row), max_length, task.language(row)) for row in rows
        ]
        self.lengths = [sum(len(window.spans) for window in windows) for windows in self._windows]
        self.texts = [[window.features for window in windows] for windows in self._windows]
        self._taught = [self._is_taught(row) for row in range(len(rows))] if teach else []
        self.notes = tuple(self._passed_over(max_length)) if teach else ()

    def _is_taught(self, row: int) -> bool:
        """Whether the row has no answer, or one that is whole in a window; others would teach "no answer here"."""
        span = self._span(row)
        if span is None:
            return not self._task.lacks_its_answer(self._rows[row])
        return any(window.tokens_of(span) != (window.null, window.null) for window in self._windows[row])

    def _passed_over(self, max_length: int) -> Iterator[str]:
        astray = sum(map(self._task.lacks_its_answer, self._rows))
        if astray == len(self._rows):
            raise DataError(
                "a question answering head needs answers that occur in their texts; no answer does.",
                code="head.no-answer",
            )
        if astray:
            yield f"{astray} rows have answers that do not occur in their texts; the loss ignores them."
        if not any(self._taught):
            raise DataError(
                f"at least one answer must fit into a window of {max_length} tokens: increase --max-length.",
                code="head.no-window",
            )
        if parted := len(self._rows) - astray - sum(self._taught):
            yield (
                f"{parted} of {len(self._rows)} rows have answers too long for a window of {max_length} tokens "
                "(--max-length); the loss passes over them."
            )

    def _logits(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Return start and end logits, -inf for padding: what a window is taught does not depend on its batch."""
        batch = pad(self._base, [window.features for window in windows])
        outputs = self._base.model(**batch)
        padding = batch["attention_mask"] == 0
        starts, ends = (
            logits.float().masked_fill(padding, -torch.inf) for logits in (outputs.start_logits, outputs.end_logits)
        )
        return starts, ends

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Return the mean over these rows' windows of the cross-entropies of first and last token, halved.

        A window without the answer is taught to point at its null token. All windows are in one pass, so that gradient
        checkpointing recomputes that pass.
        """
        gold = [
            window.tokens_of(self._span(row)) if self._taught[row] else (IGNORED, IGNORED)
            for row in rows
            for window in self._windows[row]
        ]
        first, last = torch.tensor(gold, device=self._base.device).T
        starts, ends = self._logits([window for row in rows for window in self._windows[row]])
        return (cross_entropy(starts, first) + cross_entropy(ends, last)) / 2

    def terms(self, rows: Sequence[int]) -> int:
        return sum(len(self._windows[row]) for row in rows if self._taught[row])

    def _span(self, row: int) -> Characters | None:
        return self._task.span(self._rows[row])

    def answers(self, rows: Sequence[int]) -> list[str]:
        """Return the text of the best answer in any window of each row.

        A head that was taught unanswerable questions gives the empty answer where "no answer here" wins in all windows.
        """
        windows = [window for row in rows for window in self._windows[row]]
        logits: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(windows), len(rows)):  # long texts fill no larger batches than short ones
            part = windows[start : start + len(rows)]
            logits += zip(*self._logits(part), strict=True)
        each = iter(logits)
        return [self._answer(row, [(window, next(each)) for window in self._windows[row]]) for row in rows]

    def _answer(self, row: int, windows: Sequence[tuple[Window, tuple[Tensor, Tensor]]]) -> str:
        best, nothing = -torch.inf, torch.inf
        span: Characters | None = None
        for window, (starts, ends) in windows:
            nothing = min(nothing, float(starts[window.null].float() + ends[window.null].float()))
            count = len(window.spans)
            score, first, last = best_span(starts[:count], ends[:count], [span is not None for span in window.spans])
            begin, end = window.spans[first], window.spans[last]
            if begin and end and score > best:
                best, span = score, (begin[0], end[1])
        without = UNANSWERABLE in self._base.labels and nothing > best
        return self._task.answer_at(self._rows[row], None if without else span)


class Span:
    """A part of the text per question."""

    form = HEAD_FORMS["span"]
    needs = "a task whose answers are parts of a text"
    closed = False
    encode = SpanRows

    def suits(self, task: Task) -> bool:
        return isinstance(task, SpanTask)

    def labels(self, task: SpanTask, rows: Sequence[Row]) -> tuple[str, ...]:
        """Return the kinds of answers: spans, and `unanswerable` if a row has no answer."""
        without = any(task.span(row) is None and not task.lacks_its_answer(row) for row in rows)
        return (SPAN, UNANSWERABLE) if without else (SPAN,)
