"""A head that scores choices: one score for the tokens of each choice in a text that shows them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import DataError
from ...models.base import BaseModel
from ...models.head_forms import HEAD_FORMS
from .. import Marked, MarkedTask, Task
from ..data.tables import Row
from .base import IGNORED, Features, cross_entropy, cut_warning, pad

if TYPE_CHECKING:
    from transformers import BatchEncoding

Span = tuple[int, int]


def token_span(offsets: Sequence[Span], characters: Span) -> Span:
    """Return the first token of some characters, and the one after their last token.

    Characters that no token has, because the tokenizer drops them, get the token before them.

    Args:
        offsets: Start and end of each token in the text; for special tokens start = end.
        characters: Start and end of the characters; a special token never stands for them.

    Example:
        >>> token_span([(0, 0), (0, 2), (2, 5), (5, 6), (0, 0)], (3, 6))
        (2, 4)
    """
    start, end = characters
    inside = [number for number, (first, last) in enumerate(offsets) if first < last and last > start and first < end]
    if not inside:
        before = (number for number, (first, last) in enumerate(offsets) if first < last <= start)
        inside = [max(before, default=0)]
    return inside[0], inside[-1] + 1


def shortened(marked: Marked, offsets: Sequence[Span], surplus: int) -> Marked | None:
    """Return a text whose passage has about `surplus` fewer tokens at its end; None if the passage is empty.

    The passage loses at least one character, so repeated calls end. The choices stay whole.

    Args:
        marked: The text.
        offsets: Start and end of each token in the text.
        surplus: How many tokens to remove, at least 1.
    """
    start, end = marked.passage
    tokens = [(first, last) for first, last in offsets if max(first, start) < min(last, end)]
    if start == end or not tokens:
        return None
    stop = max(start, tokens[max(0, len(tokens) - surplus)][0])
    stop = start + len(marked.text[start:stop].rstrip())
    removed = end - stop
    spans = tuple((first - removed, last - removed) for first, last in marked.spans)
    return replace(marked, text=marked.text[:stop] + marked.text[end:], spans=spans, passage=(start, stop))


class ChoiceRows:
    """Questions, each in one text with all its choices.

    The score of a choice is the mean of the head's output over the tokens of the choice. The head is linear and has no
    bias, so this is its output for the mean state. The probabilities of the choices are the softmax of their scores.

    Args:
        base: A model with a head of one output per token, and a fast tokenizer.
        task: The task.
        rows: Its rows.
        max_length: Longest text in tokens. A longer text loses the end of its passage, never a choice.
        teach: Whether the loss is needed.

    Raises:
        DataError: a text is too long even without its passage.

    Reference: Schmidt et al., Findings of EMNLP 2024, arXiv 2406.12739, section 4 (Belebele).
    """

    def __init__(
        self, base: BaseModel, task: MarkedTask, rows: Sequence[Row], *, max_length: int, teach: bool = False
    ) -> None:
        self._base, self._task, self._rows = base, task, rows
        texts = [task.marked(row) for row in rows]
        encoded = self._encode(texts, range(len(rows)))
        long = [number for number, row in enumerate(encoded) if len(row["input_ids"]) > max_length]
        for number in long:
            texts[number], encoded[number] = self._fitted(texts[number], encoded[number], number, max_length)
        names = base.tokenizer.model_input_names
        self.texts: Sequence[Sequence[Features]] = [[{n: row[n] for n in names if n in row}] for row in encoded]
        self.lengths = [len(row["input_ids"]) for row in encoded]
        self._spans = [
            [token_span(row["offset_mapping"], span) for span in text.spans]
            for text, row in zip(texts, encoded, strict=True)
        ]
        options = [task.options(row) for row in rows]
        answers = [task.answer(row) for row in rows]
        self._options = options
        self._gold = [
            each.index(right) if right in each else IGNORED for each, right in zip(options, answers, strict=True)
        ]
        cut = [task.language(rows[number]) for number in long]
        self.notes = (cut_warning(cut, len(rows), max_length, "the ends of their passages"),) if cut else ()

    def _encode(self, texts: Sequence[Marked], numbers: Sequence[int]) -> list[BatchEncoding]:
        languages = [self._task.language(self._rows[number]) for number in numbers]
        return self._base.encode([text.text for text in texts], languages, return_offsets_mapping=True, verbose=False)

    def _fitted(
        self, text: Marked, encoded: BatchEncoding, number: int, max_length: int
    ) -> tuple[Marked, BatchEncoding]:
        """Return a row's text and tokens, with the passage cut so that they fit."""
        part: Marked | None = text
        while (surplus := len(encoded["input_ids"]) - max_length) > 0:
            part = shortened(text, encoded["offset_mapping"], surplus)
            if part is None:
                raise DataError(
                    f"a question and its choices must fit into {max_length} tokens (--max-length, and the positions of "
                    f"the base model), and {text.text[-40:]!r} needs {len(encoded['input_ids'])} without its passage. "
                    "Increase --max-length, or leave out the row.",
                    code="head.long-choices",
                )
            text = part
            (encoded,) = self._encode([text], [number])
        return text, encoded

    def _weights(self, rows: Sequence[int], tokens: int) -> Tensor:
        """Return the share of each token in the mean of each choice; a choice that a row does not have has zeros.

        Shapes: [rows choices tokens].
        """
        weights = torch.zeros(len(rows), max(len(self._spans[row]) for row in rows), tokens)
        for number, row in enumerate(rows):
            for choice, (first, end) in enumerate(self._spans[row]):
                weights[number, choice, first:end] = 1 / (end - first)
        return weights

    def _scores(self, rows: Sequence[int]) -> Tensor:
        """Return the scores of the choices in float32, -inf for choices that a row does not have. [rows choices]."""
        batch = pad(self._base, [self.texts[row][0] for row in rows])
        outputs = self._base.model(**batch).logits.squeeze(-1).float()
        weights = self._weights(rows, outputs.shape[1]).to(outputs.device)
        scores = torch.einsum("rct,rt->rc", weights, outputs)
        return scores.masked_fill(weights.sum(-1) == 0, -torch.inf)

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of the right choices of these rows."""
        gold = torch.tensor([self._gold[row] for row in rows], device=self._base.device)
        return cross_entropy(self._scores(rows), gold)

    def terms(self, rows: Sequence[int]) -> int:
        return sum(self._gold[row] != IGNORED for row in rows)

    def answers(self, rows: Sequence[int]) -> list[str]:
        best = self._scores(rows).argmax(-1).tolist()
        return [self._options[row][index] for row, index in zip(rows, best, strict=True)]


class PooledChoices:
    """One of several choices, all shown in one text."""

    form = HEAD_FORMS["choices"]
    needs = "a task with choices in one text"
    closed = False
    encode = ChoiceRows

    def suits(self, task: Task) -> bool:
        return isinstance(task, MarkedTask)

    def labels(self, _task: MarkedTask, _rows: Sequence[Row]) -> tuple[str, ...]:
        """Return the only output, the score of a choice: rows may have different numbers of choices."""
        return ("choice",)
