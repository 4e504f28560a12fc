"""What is left of an adapter where it was written into a weight."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
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
        kept_rest: `kept` without the first token of each text, whose inputs may be so large that it decides `kept`
            alone; None where it was not measured.
        error_rest: `error` without these tokens.
        kept_even: `kept` where no token counts more than one of usual size.
        error_even: `error` likewise.
    """

    kept: float
    error: float
    codes_changed: float | None = None
    size: float = 0.0
    kept_rest: float | None = None
    error_rest: float | None = None
    kept_even: float | None = None
    error_even: float | None = None

    @property
    def least_kept(self) -> float:
        """The least of what is kept by each way to count tokens, for which limits hold."""
        return min(one for one in (self.kept, self.kept_rest, self.kept_even) if one is not None)

    @property
    def most_error(self) -> float:
        """The largest error by any way to count tokens, for which limits hold."""
        return max(one for one in (self.error, self.error_rest, self.error_even) if one is not None)

    @property
    def overall_error(self) -> float:
        """The root of the mean of the squared errors by all ways to count tokens; of two results the lower is taken."""
        found = [one for one in (self.error, self.error_rest, self.error_even) if one is not None]
        return math.sqrt(sum(one * one for one in found) / len(found))

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        return {name: value for name, value in asdict(self).items() if name != "size"}


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
    """Return kept, at most 1 each, and error as means over modules that have an effect; each counts alike.

    Means of what only some modules have measured are over those.
    """
    acting = [one for one in found if one.size > 0]
    if not acting:
        return Fidelity(kept=1.0, error=0.0)

    def mean(name: str) -> float | None:
        values = [value for one in acting if (value := getattr(one, name)) is not None]
        values = [min(value, 1.0) for value in values] if name.startswith("kept") else values
        return sum(values) / len(values) if values else None

    means = {one.name: mean(one.name) for one in fields(Fidelity) if one.name.startswith(("kept", "error"))}
    return Fidelity(**means)  # type: ignore[arg-type]  # kept and error are known of each
