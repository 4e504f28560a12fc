"""Cache of the source states of a task's rows, within limits of memory and disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..models.base import BaseModel, backbone, reading
from ..tasks.heads.base import Features, pad_to
from .extra_modules import PROJECTION
from .latents import Latents
from .sources import Sources, block_of, fused_modules, read_sources
from .state_cache import StateCache

_NONE = -1
"""Number of a missing text."""


class SourceBank:
    """The states that the base model, or another encoder, computes for each row's source.

    A row may be read in several passes, such as the windows of a long text, and its source may consist of several
    texts. If the counts differ they are paired in proportion: pass k of n is paired with text k m / n of m, rounded
    down.

    Args:
        base: A base model with fusion LoRAs in it.
        texts: Encoded texts of each row's source; empty for a missing one.
        prompts: Tokens of each pass of each row's target, without the answer.
        settings: The fusion's settings, by PEFT's names (such as `fusion_alignment`).
        latents: Encoder whose states are the sources, if not the base's; `texts` are encoded with its tokenizer then.
    """

    def __init__(
        self,
        base: BaseModel,
        texts: Sequence[Sequence[Features]],
        prompts: Sequence[Sequence[int]],
        settings: Mapping[str, Any],
        latents: Latents | None = None,
    ) -> None:
        self._base, self._prompts, self._settings, self._latents = base, prompts, settings, latents
        # A text that is the source of several rows or passes is cached once.
        numbers: dict[tuple[object, ...], int] = {}
        self._texts: list[Features] = []
        self._paired: list[list[int]] = []
        for row_numbers, passes in zip(texts, prompts, strict=True):
            chosen = (
                [row_numbers[index * len(row_numbers) // len(passes)] for index in range(len(passes))]
                if row_numbers
                else []
            )
            keys = [tuple((name, *values) for name, values in text.items()) for text in chosen]
            for key, text in zip(keys, chosen, strict=True):
                if numbers.setdefault(key, len(numbers)) == len(self._texts):
                    self._texts.append(text)
            self._paired.append([numbers[key] for key in keys] or [_NONE] * len(passes))
        self._lengths = [len(text["input_ids"]) for text in self._texts]
        self._longest = max(self._lengths, default=0)  # a model may not support more positions
        if settings.get("fusion_pads"):  # as in the release, states of padding are kept, up to one common length
            self._lengths = [self._longest] * len(self._texts)
        self._blocks: tuple[str, ...] = ()
        self._kept = StateCache()

    def of(self, rows: Sequence[int]) -> Sources | None:
        """Return the sources of a batch, padded on the right: all passes of the first row, then of the next.

        The result is None if no row has a source.

        Args:
            rows: Indices of the rows, in the order of the batch.
        """
        numbers = [number for row in rows for number in self._paired[row]]
        there = [number for number in numbers if number != _NONE]
        if not there:
            return None
        states = self._padded(numbers, self._fresh(there, len(rows)))
        lengths = torch.tensor([self._length(number) for number in numbers], device=states.device)
        sources = Sources(
            states=self._projected(states[0]) if self._latents else dict(zip(self._blocks, states, strict=True)),
            mask=torch.arange(states.shape[2], device=states.device)[None] < lengths[:, None],
            lead=torch.zeros_like(lengths),
        )
        alignment = self._settings["fusion_alignment"]
        prompts = [tokens for row in rows for tokens in self._prompts[row]]
        return sources.align("position" if alignment == "soft" else alignment, prompts)

    def _fresh(self, numbers: Sequence[int], most: int) -> dict[int, Tensor]:
        """Compute the states of those texts that are not cached yet: a tensor [blocks tokens width] for each.

        Args:
            numbers: Numbers of texts.
            most: Texts per pass, at most as many rows as a pass over targets has.
        """
        computed: dict[int, Tensor] = {}
        missing = [number for number in dict.fromkeys(numbers) if number not in self._kept]
        for start in range(0, len(missing), most):
            computed |= self._read(missing[start : start + most])
        # States that were read with dropout are used once: each pass needs other random numbers.
        is_once = bool(self._settings.get("fusion_dropout")) and self._base.model.training
        for number, states in {} if is_once else computed.items():
            self._kept.add(number, states)
        return computed

    def _padded(self, numbers: Sequence[int], fresh: Mapping[int, Tensor]) -> Tensor:
        """Return states of texts on the model's device. [blocks texts tokens width]."""

        def states_of(number: int) -> Tensor:
            return fresh[number] if number in fresh else self._kept[number]

        first = states_of(next(number for number in numbers if number != _NONE))
        shape = len(first), len(numbers), max(map(self._length, numbers)), first.shape[-1]
        padded = torch.zeros(shape, dtype=first.dtype, device=self._base.device)
        for index, number in enumerate(numbers):
            if number != _NONE:
                padded[:, index, : self._lengths[number]] = states_of(number)
        return padded

    def _length(self, number: int) -> int:
        return 0 if number == _NONE else self._lengths[number]

    def _projected(self, latents: Tensor) -> dict[str, Tensor]:
        """Return the same projected states for every block; not cached, since the projection is trained."""
        model = self._base.model
        states = model.get_submodule(PROJECTION)(latents.to(model.dtype))
        return dict.fromkeys(map(block_of, fused_modules(model)), states)

    def _read(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Return states of texts; texts of similar length are read together.

        Each is padded to a length that depends only on its own, so its states do not depend on the other texts (on
        hardware whose matrix products do not depend on the batch size).
        """
        padded = {number: min(_rounded(self._lengths[number]), self._longest) for number in numbers}
        return {
            number: states
            for length in sorted(set(padded.values()))
            for number, states in self._read_together([n for n in numbers if padded[n] == length], length)
        }

    def _read_together(self, numbers: Sequence[int], length: int) -> Iterator[tuple[int, Tensor]]:
        texts = [self._texts[number] for number in numbers]
        whole = [self._latents.read(texts, length)] if self._latents else self._read_by_base(texts, length)
        # States after a norm may be wider than the output of the last block.
        dtype = reduce(torch.promote_types, (states.dtype for states in whole))
        for index, number in enumerate(numbers):
            count = self._lengths[number]
            yield number, torch.stack([states[index, :count].to(dtype) for states in whole])

    def _read_by_base(self, texts: Sequence[Features], length: int) -> list[Tensor]:
        base = self._base
        batch = pad_to(base.tokenizer, texts, length).to(base.device)
        sources = read_sources(
            base.model,
            batch,
            norm=self._settings["fusion_norm"],
            offset=self._settings["fusion_offset"],
            dropout=bool(self._settings.get("fusion_dropout")),
            run=lambda: backbone(base)(**batch, **reading(base)),
        )
        self._blocks = tuple(sources.states)
        return list(sources.states.values())


def _rounded(length: int) -> int:
    """Return the next power of two, or three quarters of it if that is enough.

    Example:
        >>> [_rounded(length) for length in (1, 5, 6, 7, 8, 9, 13, 40)]
        [1, 6, 6, 8, 8, 12, 16, 48]
    """
    whole = 1 << (length - 1).bit_length()
    return 3 * whole // 4 if whole >= 4 and length <= 3 * whole // 4 else whole
