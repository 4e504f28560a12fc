"""States and embeddings of the two models of a stack, and the first projection between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..algebra.ridge import ridge_map
from ..models.base import BaseModel, backbone
from ..models.eval_mode import evaluating, loras_off
from ..models.pooling import Standard, pool
from ..models.stack import Projected, embedding_of
from ..progress import Watcher
from .by_length import vectors_by_length
from .closed_form import MAP_PENALTIES

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

FITTED = 4000
"""Most texts that the first projection is fitted on."""

Ids = list[list[int]]


class StackStates:
    """States of the texts of a stack: through the encoder, and through the own embeddings of the model on top.

    Args:
        base: The stack.
        tokenizer: Tokenizer of the model on top.
        pooling: "mean", "first" or "last".
    """

    def __init__(self, base: BaseModel, tokenizer: PreTrainedTokenizerBase, pooling: str) -> None:
        self._base, self._top_tokenizer, self._pooling = base, tokenizer, pooling
        self.embedding: Projected = embedding_of(base.model)

    def run(self, tokenizer: PreTrainedTokenizerBase, ids: Ids) -> Tensor:
        """Return the states of texts by their ids.

        Shapes: [rows width].
        """
        batch = self._padded(tokenizer, ids)
        mask = batch["attention_mask"]
        states = backbone(self._base)(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return pool(states, mask, self._pooling)

    def student(self, ids: Ids) -> Tensor:
        """Return the states of texts as the encoder reads them.

        Shapes: [rows width].
        """
        return self.run(self._base.tokenizer, ids)

    def teacher(self, ids: Ids) -> Tensor:
        """Return the states of texts as the frozen model on top reads them itself, without a LoRA.

        Shapes: [rows width].
        """
        with torch.no_grad(), evaluating(self._base.model), loras_off(self._base.model), self.embedding.bypassed():
            return self.run(self._top_tokenizer, ids)

    def student_means(self, ids: Ids) -> Tensor:
        """Return the mean state of the encoder of each text, in float32.

        Shapes: [rows encoder_width].
        """
        return self._mean(self._base.tokenizer, ids, self.embedding.encoder_states)

    def teacher_means(self, ids: Ids) -> Tensor:
        """Return the mean own embedding of each text, in float32.

        Shapes: [rows width].
        """
        with self.embedding.bypassed():
            return self._mean(self._top_tokenizer, ids, self.embedding)

    def _mean(self, tokenizer: PreTrainedTokenizerBase, ids: Ids, read: Callable[[Tensor], Tensor]) -> Tensor:
        batch = self._padded(tokenizer, ids)
        with torch.no_grad():
            return pool(read(batch["input_ids"]).float(), batch["attention_mask"], "mean")

    def _padded(self, tokenizer: PreTrainedTokenizerBase, ids: Ids) -> BatchEncoding:
        return tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(self._base.device)


def all_vectors(compute: Callable[[Ids], Tensor], ids: Ids) -> Tensor:
    """Return the vectors of texts, on the CPU."""
    return vectors_by_length(lambda rows: compute([ids[row] for row in rows]), list(map(len, ids)))


def start_projection(
    states: StackStates,
    student: Ids,
    teacher: Ids,
    *,
    way: Literal["least-squares", "random", "keep"],
    watch: Watcher,
) -> Tensor:
    """Standardise the encoder's states, and start the projection; return the mean own embedding of each text.

    Args:
        states: Computes the states.
        student: Texts as the encoder reads them.
        teacher: The same texts as the model on top reads them.
        way: "least-squares" from the encoder's mean states to the mean own embeddings of the texts, "random", or "keep"
            for the projection that the stack has.
        watch: Receives a note on the fit.

    Shapes: returns [rows width].
    """
    x = all_vectors(states.student_means, student[:FITTED])
    y = all_vectors(states.teacher_means, teacher[:FITTED])
    standard = Standard.of([x])
    states.embedding.standardize(standard.mean, standard.spread, keep=way == "keep")
    if way != "least-squares":
        return y
    x = standard(x)
    each, ones = torch.arange(len(x), device=x.device), torch.ones(len(x), device=x.device)
    fitted = ridge_map(x, y, groups=each, weights=ones, penalties=MAP_PENALTIES)
    linear = states.embedding.projection
    with torch.no_grad():
        linear.weight.copy_(fitted.weight.T)
        linear.bias.copy_(fitted.offset - fitted.center @ fitted.weight)
    watch.note(f"the first projection explains {fitted.left_out or 0.0:.2f} of the mean embeddings of texts left out")
    return y
