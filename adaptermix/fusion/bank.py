"""Source states of a task's rows, made once where memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import BaseModel, backbone, reading
from .latents import Latents
from .parts import PROJECTION
from .sources import Sources, block_of, fused_modules, read_sources

_LATENT = "latent"
"""Name of the states of another encoder, which are the same for all blocks."""
_SHARE = 4
"""States may take one part in so many of the memory that is free."""


class SourceBank:
    """What the base makes of each row's source text.

    Args:
        base: A base model with fused LoRAs in it.
        texts: Token ids of each row's source.
        prompts: Tokens of each row's target, an answer behind it not counted.
        settings: The fusion's settings, by PEFT's names (`fusion_alignment` and so on).
        latents: Encoder whose states are the sources, if not the base's own; `texts` are its token ids then.
    """

    def __init__(
        self,
        base: BaseModel,
        texts: Sequence[Sequence[int]],
        prompts: Sequence[int],
        settings: Mapping[str, Any],
        latents: Latents | None = None,
    ) -> None:
        self._latents = latents
        self._base, self._texts, self._prompts, self._settings = base, texts, prompts, settings
        self._left = _free() // _SHARE
        self._held: dict[int, dict[str, Tensor]] = {}

    def of(self, rows: Sequence[int]) -> Sources:
        """Return the sources of a batch, padded on the right.

        Args:
            rows: Numbers of the rows, in the order of the batch.
        """
        missing = [row for row in dict.fromkeys(rows) if row not in self._held]
        fresh = self._read(missing) if missing else {}
        known = {**{row: self._held[row] for row in rows if row in self._held}, **fresh}
        is_once = bool(self._settings.get("fusion_dropout")) and self._base.model.training
        for row, states in {} if is_once else fresh.items():
            size = sum(tensor.nbytes for tensor in states.values())
            if size <= self._left:
                self._held[row] = {block: tensor.cpu() for block, tensor in states.items()}
                self._left -= size
        longest = max(len(self._texts[row]) for row in rows)
        device = self._base.device
        states = {
            block: torch.stack([_padded(known[row][block].to(device), longest) for row in rows])
            for block in known[rows[0]]
        }
        lengths = torch.tensor([len(self._texts[row]) for row in rows], device=device)
        mask = torch.arange(longest, device=device)[None] < lengths[:, None]
        if self._latents:
            states = self._projected(states[_LATENT])
        found = Sources(states=states, mask=mask, lead=torch.zeros_like(lengths))
        alignment = self._settings["fusion_alignment"]
        return found.beside("position" if alignment == "soft" else alignment, [self._prompts[row] for row in rows])

    def _projected(self, latents: Tensor) -> dict[str, Tensor]:
        """Return the same projected states for every block; the projection learns."""
        model = self._base.model
        states = model.get_submodule(PROJECTION)(latents.to(model.dtype))
        return dict.fromkeys(map(block_of, fused_modules(model)), states)

    def _read(self, rows: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        base = self._base
        if self._latents:
            read = self._latents.read([self._texts[row] for row in rows])
            return {row: {_LATENT: read[n, : len(self._texts[row])].clone()} for n, row in enumerate(rows)}
        batch = base.tokenizer.pad(
            {"input_ids": [list(self._texts[row]) for row in rows]}, padding_side="right", return_tensors="pt"
        ).to(base.device)
        found = read_sources(
            base.model,
            batch,
            norm=self._settings["fusion_norm"],
            offset=self._settings["fusion_offset"],
            dropout=bool(self._settings.get("fusion_dropout")),
            run=lambda: backbone(base)(**batch, **reading(base)),
        )
        return {
            row: {block: states[place, : len(self._texts[row])].clone() for block, states in found.states.items()}
            for place, row in enumerate(rows)
        }


def _padded(states: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, length - len(states)))


def _free() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
