"""Sentence vectors from the middle of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.base import BaseModel, backbone, reading
from ..models.blocks import blocks, first_blocks
from ..models.pooling import Pooler

if TYPE_CHECKING:
    from transformers import BatchEncoding

CHUNKS = 4


class MiddleStates:
    """The residual stream after block L, before any final norm: HF's `hidden_states[L]` for L < n.

    Args:
        base: A base model; blocks after L are not run.
        layer: L; default the last block.
        exclude_bos: Leave the first token out of the mean where the tokenizer puts a special one there.
        pooling: "mean" over the tokens, or "bos", the first token.
        chunks: In how many parts rows are run, by their lengths.
        standardize: Prepare vectors for z-scores; see `Pooler`.
        pool: Makes the vectors, instead of a pooler of the three settings.
    """

    def __init__(
        self,
        base: BaseModel,
        layer: int | None = None,
        *,
        exclude_bos: bool = False,
        pooling: str = "mean",
        chunks: int = CHUNKS,
        standardize: str = "none",
        pool: Pooler | None = None,
    ) -> None:
        self._model = base.model
        self._body = backbone(base)
        self._tokenizer = base.tokenizer
        self._device = base.device
        self._extra = reading(base)
        self._pool = pool or Pooler(base.tokenizer, pooling=pooling, exclude_bos=exclude_bos, standardize=standardize)
        self._chunks = chunks
        self._caught: list[Tensor] = []
        self._listening = False
        stack = blocks(base.model)[1]
        self._layer = layer or len(stack)
        stack[self._layer - 1].register_forward_hook(self._catch)

    def _catch(self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        if self._listening:
            self._caught = [output if isinstance(output, Tensor) else output[0]]

    def count(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a sentence count."""
        return self._pool.count(ids)

    def _run(self, batch: BatchEncoding) -> Tensor:
        self._listening = True
        try:
            with first_blocks(self._model, self._layer):
                self._body(**batch, **self._extra)
            return self._caught.pop()
        finally:
            self._listening = False

    def states(self, encoded: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the states of all tokens, padded on the right, and which of them count.

        Shapes: [rows tokens width], [rows tokens].
        """
        batch = self._tokenizer.pad({"input_ids": list(encoded)}, padding_side="right", return_tensors="pt").to(
            self._device
        )
        return self._run(batch), self._pool.counted(encoded, batch["attention_mask"])

    def pooled(self, encoded: Sequence[list[int]]) -> Tensor:
        """Return one vector per token list, in float32.

        Rows of like length are run together, since padding is wasted work; the vectors do not depend on it.

        Shapes: [rows width].
        """
        return self.read(encoded)[0]

    def read(self, encoded: Sequence[list[int]], tokens_of: range = range(0)) -> tuple[Tensor, Tensor]:
        """Return one vector per token list, and the states of some lists' tokens: shorter lists first, else in order.

        Args:
            encoded: The token lists.
            tokens_of: Numbers of the lists whose tokens are returned, without the tokens that a mean leaves out.

        Shapes: [rows width], [tokens width].
        """
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        size = -(-len(order) // self._chunks)
        vectors, tokens = [], []
        for chunk in (order[start : start + size] for start in range(0, len(order), size)):
            states, mask = self.states([encoded[row] for row in chunk])
            vectors.append(self._pool(states, mask))
            if tokens_of:
                chosen = torch.tensor([row in tokens_of for row in chunk], device=mask.device)
                tokens.append(states[mask.bool() & chosen[:, None]])
        joined = torch.cat(vectors)
        back = torch.tensor(order, device=joined.device).argsort()
        return joined[back], torch.cat(tokens) if tokens else joined[:0]
