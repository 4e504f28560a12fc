"""A head that tags words: the first sub-word of each is labelled, the others have no label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import DataError
from ...models.base import BaseModel
from ...models.head_forms import HEAD_FORMS
from .. import FullyTaggedTask, Task, TokenTask
from ..data.tables import Row
from .base import IGNORED, cross_entropy, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spelling = Callable[[Sequence[str]], list[str]]
UNSEEN = "_"
"""Tag of a word that the head cannot see, where every word has a tag."""


def repair(tags: Sequence[str]) -> tuple[str, ...]:
    """Return tags as valid IOB2, as conlleval reads them: an `I-` that continues no span of its type starts a span.

    Example:
        >>> repair(["I-PER", "I-PER", "I-LOC", "O", "I-LOC"])
        ('B-PER', 'I-PER', 'B-LOC', 'O', 'B-LOC')
    """
    repaired: list[str] = []
    for tag in tags:
        continues = tag[:2] != "I-" or (repaired and repaired[-1][1:] == tag[1:])
        repaired.append(tag if continues else f"B{tag[1:]}")
    return tuple(repaired)


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """Return how to spell words for a tokenizer so that it gives the tokens that they have in a sentence.

    Byte-level tokenizers read a word without a blank before it as the start of a text.
    """
    whole = tokenizer("a a", add_special_tokens=False)["input_ids"]
    spaced = tokenizer(["a", " a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    bare = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    if spaced == whole != bare:
        return lambda words: [*words[:1], *(f" {word}" for word in words[1:])]
    return list


def first_places(word_ids: Sequence[int | None], count: int) -> list[int | None]:
    """Return the index of the first token of each of `count` words, None for words without a token.

    Example:
        >>> first_places([None, 0, 0, 2, None], 4)
        [1, None, 3, None]
    """
    indices: list[int | None] = [None] * count
    for index, word in enumerate(word_ids):
        if word is not None and indices[word] is None:
            indices[word] = index
    return indices


class TokenRows:
    """Words with their tags.

    Args:
        base: A model with a head over tags, and a fast tokenizer.
        task: The task.
        rows: Its rows.
        max_length: Longest row in tokens; words beyond are `O` to the head, or `_` where every word has a tag.
        teach: Whether the loss is needed.

    Raises:
        DataError: a row has no words; the loss is needed, and the head has no tag of any row.
    """

    def __init__(
        self, base: BaseModel, task: TokenTask, rows: Sequence[Row], *, max_length: int, teach: bool = False
    ) -> None:
        self._base, self._task, self._rows, self._labels = base, task, rows, base.labels
        spelled = spelling_of(base.tokenizer)
        words = [task.words(row) for row in rows]
        self._encoded = base.encode(
            list(map(spelled, words)),
            list(map(task.language, rows)),
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
        )
        self._first = [first_places(row.word_ids(), len(each)) for row, each in zip(self._encoded, words, strict=True)]
        self.lengths = [len(row["input_ids"]) for row in self._encoded]
        self.texts = [[row] for row in self._encoded]
        self.notes = tuple(filter(None, [self._cut(max_length), self._unknown() if teach else None]))
        self._gold = [self._labelled(row) for row in range(len(rows))] if teach else []

    def _cut(self, max_length: int) -> str | None:
        cut = [indices.count(None) for indices in self._first if None in indices]
        if not cut:
            return None
        return (
            f"{sum(cut)} words in {len(cut)} rows are beyond {max_length} tokens, or have no token; the head cannot "
            "learn or label them."
        )

    def _unknown(self) -> str | None:
        tags = [tag for row in self._rows for tag in self._task.tags(row)]
        new = [tag for tag in tags if tag not in self._labels]
        if len(new) == len(tags):
            raise DataError(
                f"rows must have tags that the head has ({', '.join(self._labels)}), and none has.", code="head.no-tag"
            )
        if not new:
            return None
        return f"{len(new)} words have tags that the head does not have, such as {new[0]}; the loss passes over them."

    def _labelled(self, row: int) -> list[int]:
        gold = [IGNORED] * self.lengths[row]
        for index, tag in zip(self._first[row], self._task.tags(self._rows[row]), strict=True):
            if index is not None and tag in self._labels:
                gold[index] = self._labels.index(tag)
        return gold

    def loss(self, rows: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of these rows' words."""
        batch = pad(self._base, [self._encoded[row] for row in rows])
        width = batch["input_ids"].shape[1]
        labels = [self._gold[row] + [IGNORED] * (width - self.lengths[row]) for row in rows]
        gold = torch.tensor(labels, device=self._base.device)
        return cross_entropy(self._base.model(**batch).logits.flatten(0, 1), gold.flatten())

    def terms(self, rows: Sequence[int]) -> int:
        return sum(gold != IGNORED for row in rows for gold in self._gold[row])

    def predictions(self, rows: Sequence[int]) -> list[Tensor]:
        logs = self._base.model(**pad(self._base, [self._encoded[row] for row in rows])).logits.float().log_softmax(-1)
        words = [[index for index in self._first[row] if index is not None] for row in rows]
        return [of_row[indices] for of_row, indices in zip(logs, words, strict=True)]

    def answers(self, rows: Sequence[int]) -> list[str]:
        best = self._base.model(**pad(self._base, [self._encoded[row] for row in rows])).logits.argmax(-1).tolist()
        outside, repaired = (UNSEEN, tuple) if isinstance(self._task, FullyTaggedTask) else ("O", repair)
        return [
            self._task.answer_from_tags(
                self._rows[row],
                repaired([outside if index is None else self._labels[tags[index]] for index in self._first[row]]),
            )
            for row, tags in zip(rows, best, strict=True)
        ]


class Tokens:
    """One tag per word."""

    form = HEAD_FORMS["tokens"]
    needs = "a task whose answers are tags of words"
    closed = False
    encode = TokenRows

    def suits(self, task: Task) -> bool:
        return isinstance(task, TokenTask)

    def labels(self, task: TokenTask, rows: Sequence[Row]) -> tuple[str, ...]:
        """Return `O`, then `B-` and `I-` of each type that occurs, by name, or the task's tags; nothing for no rows."""
        if isinstance(task, FullyTaggedTask):
            return task.head_tags(rows)
        kinds = sorted({tag[2:] for row in rows for tag in task.tags(row)} - {""})
        return ("O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI")) if rows else ()
