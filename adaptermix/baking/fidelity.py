"""What is left of an adapter where it was written into a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    r"""How far a realised change of outputs is the intended one.

    With the intended change $a = D x$ and the realised one $b$ of each row of inputs:

    Args:
        kept: $\sum a b / \sum a^2$, the share of the effect along the intended one; 1 is all of it.
        error: $\sqrt{\sum (b - a)^2 / \sum a^2}$, how far the rest is off; 1 is as far as doing nothing.
        codes_changed: Share of the codes in 4 bits that are not those of the base; None in 16 bits.
        size: $\sum a^2$; 0 where nothing was intended.
    """

    kept: float
    error: float
    codes_changed: float | None = None
    size: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        return {"kept": self.kept, "error": self.error, "codes_changed": self.codes_changed}


def fidelity(
    intended: Float[Tensor, "out in"],
    realised: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"] | None,
    *,
    shift: Float[Tensor, " out"] | None = None,
    mean: Float[Tensor, " in"] | None = None,
    codes_changed: float | None = None,
) -> Fidelity:
    r"""Measure what is left of a delta.

    Args:
        intended: The delta.
        realised: The difference of the weight that is there now from that of the base.
        moment: Mean of $x x^\top$ over rows of inputs; None counts all directions alike, as if nothing were known.
        shift: What was added to the bias.
        mean: Mean of x over the same rows, which the shift needs.
        codes_changed: Share of codes that changed.
    """
    weighted = intended if moment is None else intended @ moment
    rest = realised - intended
    size = float((weighted * intended).sum(dtype=torch.float64))
    along = float((weighted * realised).sum(dtype=torch.float64))
    off = float(((rest if moment is None else rest @ moment) * rest).sum(dtype=torch.float64))
    if shift is not None and mean is not None:
        along += float((shift * (intended @ mean)).sum(dtype=torch.float64))
        off += float((shift * (2 * (rest @ mean) + shift)).sum(dtype=torch.float64))
    if size <= 0:
        return Fidelity(kept=1.0, error=0.0, codes_changed=codes_changed)
    return Fidelity(kept=along / size, error=max(0.0, off / size) ** 0.5, codes_changed=codes_changed, size=size)


def over_modules(found: list[Fidelity]) -> Fidelity:
    """Return kept, at most 1 each, and error as means over modules that have an effect; each counts alike."""
    acting = [one for one in found if one.size > 0]
    if not acting:
        return Fidelity(kept=1.0, error=0.0)
    return Fidelity(
        kept=sum(min(one.kept, 1.0) for one in acting) / len(acting),
        error=sum(one.error for one in acting) / len(acting),
    )
