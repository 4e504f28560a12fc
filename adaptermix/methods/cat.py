"""CAT of LoRA Soups: concatenated LoRAs, a learned coefficient for each in every module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .base import method
from .fuse import Fuse


@method("cat")
@dataclass(frozen=True, slots=True, kw_only=True)
class Cat(Fuse):
    r"""Concatenate LoRAs with a coefficient per adapter and module, learned on rows of the task.

    $\Delta_m = \sum_i \alpha_{im} s_i B_i A_i$ for each module m. This is `fuse` with `per=module`: the same sum, the
    same learning and options, and the same plain adapter as its result. By default `fuse` has one gate for all modules
    of a layer, which few rows overfit less.

    Args:
        per: As in `fuse`.
        steps: As in `fuse`.
        rate: As in `fuse`.
        batch: As in `fuse`.
        decay: As in `fuse`.

    Shapes: k updates [out in] give one [out in].
    Differs from the paper: coefficients start at `--weights`; give 1/k each for an average. Steps and rate are those of
    `fuse`, and with dev rows the coefficients of least dev loss are taken.
    Exact when: always.
    Reference: Prabhakar et al., LoRA Soups, COLING 2025 (industry track), arXiv 2410.13025, section 3.
    """

    per: Literal["layer", "module", "adapter"] = "module"
