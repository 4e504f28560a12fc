"""A finished module of a bake, which the journal stores and the tensor writer produces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra import LowRank
from .report import BakedModule


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """One module of a quantised result.

    Args:
        tensors: Stored tensors, by name.
        module: Its report.
        is_whole: Whether it stays in 16 bits.
        shift: Change of its bias.
        lora: Its residual LoRA.
        lora_dtype: Storage dtype of the LoRA's factors.
    """

    tensors: Mapping[str, Tensor]
    module: BakedModule
    is_whole: bool = False
    shift: Tensor | None = None
    lora: LowRank | None = None
    lora_dtype: torch.dtype = torch.float32
