"""Source states of a task's rows, made once where memory or disk allow."""

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
from .state_cache import Kept

_NONE = -1
"""Number of a text that is missing."""


class SourceBank:
    """What the base, or another encoder, makes of each row's source.

    A row may be read in several passes, as windows of a text are, and its source may be several texts. Where the counts
    differ they stand beside each other in proportion: beside pass k of n stands text k m / n of m, rounded down.

    Args:
        base: A base model with fused LoRAs in it.
        texts: What is read of each row's source; nothing of one that is missing.
        prompts: Tokens of each pass of each row's target, an answer behind it not counted.
        settings: The fusion's settings, by PEFT's names (`fusion_alignment` and so on).
        latents: Encoder whose states are the sources, if not the base's own; `texts` are of its tokenizer then.
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
        # a text that stands beside several rows or passes is one
        numbers: dict[tuple[Any, ...], int] = {}
        self._texts: list[Features] = []
        self._beside: list[list[int]] = []
        for own, passes in zip(texts, prompts, strict=True):
            chosen = [own[place * len(own) // len(passes)] for place in range(len(passes))] if own else []
            keys = [tuple((name, *values) for name, values in text.items()) for text in chosen]
            for key, text in zip(keys, chosen, strict=True):
                if numbers.setdefault(key, len(numbers)) == len(self._texts):
                    self._texts.append(text)
            self._beside.append([numbers[key] for key in keys] or [_NONE] * len(passes))
        self._lengths = [len(text["input_ids"]) for text in self._texts]
        self._longest = max(self._lengths, default=0)  # models may have no more places
        if settings.get("fusion_pads"):  # states of padding are kept too, up to one length, as the release has it
            self._lengths = [self._longest] * len(self._texts)
        self._blocks: tuple[str, ...] = ()
        self._kept = Kept()

    def of(self, rows: Sequence[int]) -> Sources | None:
        """Return the sources of a batch, padded on the right: of all passes of the first row, then of the next.

        None if no row has a source.

        Args:
            rows: Numbers of the rows, in the order of the batch.
        """
        numbers = [number for row in rows for number in self._beside[row]]
        there = [number for number in numbers if number != _NONE]
        if not there:
            return None
        states = self._padded(numbers, self._fresh(there, len(rows)))
        lengths = torch.tensor([self._length(number) for number in numbers], device=states.device)
        found = Sources(
            states=self._projected(states[0]) if self._latents else dict(zip(self._blocks, states, strict=True)),
            mask=torch.arange(states.shape[2], device=states.device)[None] < lengths[:, None],
            lead=torch.zeros_like(lengths),
        )
        alignment = self._settings["fusion_alignment"]
        prompts = [tokens for row in rows for tokens in self._prompts[row]]
        return found.beside("position" if alignment == "soft" else alignment, prompts)

    def _fresh(self, numbers: Sequence[int], most: int) -> dict[int, Tensor]:
        """Return states of texts that were not kept before: a tensor [blocks tokens width] of each.

        Args:
            numbers: Numbers of texts.
            most: Texts of a pass: no more than the passes over targets have rows.
        """
        found: dict[int, Tensor] = {}
        missing = [number for number in dict.fromkeys(numbers) if number not in self._kept]
        for start in range(0, len(missing), most):
            found |= self._read(missing[start : start + most])
        is_once = bool(self._settings.get("fusion_dropout")) and self._base.model.training
        for number, states in {} if is_once else found.items():
            self._kept.add(number, states)
        return found

    def _padded(self, numbers: Sequence[int], fresh: Mapping[int, Tensor]) -> Tensor:
        """Return states of texts where the model is. [blocks texts tokens width]."""

        def states_of(number: int) -> Tensor:
            return fresh[number] if number in fresh else self._kept[number]

        first = states_of(next(number for number in numbers if number != _NONE))
        shape = len(first), len(numbers), max(map(self._length, numbers)), first.shape[-1]
        found = torch.zeros(shape, dtype=first.dtype, device=self._base.device)
        for place, number in enumerate(numbers):
            if number != _NONE:
                found[:, place, : self._lengths[number]] = states_of(number)
        return found

    def _length(self, number: int) -> int:
        return 0 if number == _NONE else self._lengths[number]

    def _projected(self, latents: Tensor) -> dict[str, Tensor]:
        """Return the same projected states for every block; the projection learns."""
        model = self._base.model
        states = model.get_submodule(PROJECTION)(latents.to(model.dtype))
        return dict.fromkeys(map(block_of, fused_modules(model)), states)

    def _read(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Return states of texts, read together where they are about as long.

        Each is padded to a length that follows from its own, so its states do not depend on the texts beside it (where
        the hardware's products do not depend on their number).
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
        # behind a norm states may be wider than what comes out of the last block
        dtype = reduce(torch.promote_types, (states.dtype for states in whole))
        for place, number in enumerate(numbers):
            count = self._lengths[number]
            yield number, torch.stack([states[place, :count].to(dtype) for states in whole])

    def _read_by_base(self, texts: Sequence[Features], length: int) -> list[Tensor]:
        base = self._base
        batch = pad_to(base.tokenizer, texts, length).to(base.device)
        found = read_sources(
            base.model,
            batch,
            norm=self._settings["fusion_norm"],
            offset=self._settings["fusion_offset"],
            dropout=bool(self._settings.get("fusion_dropout")),
            run=lambda: backbone(base)(**batch, **reading(base)),
        )
        self._blocks = tuple(found.states)
        return list(found.states.values())


def _rounded(length: int) -> int:
    """Return the next power of two, or three quarters of it if that is enough.

    Example:
        >>> [_rounded(length) for length in (1, 5, 6, 7, 8, 9, 13, 40)]
        [1, 6, 6, 8, 8, 12, 16, 48]
    """
    whole = 1 << (length - 1).bit_length()
    return 3 * whole // 4 if whole >= 4 and length <= 3 * whole // 4 else whole
