"""Measures of how much of an adapter's effect remains after writing it into a weight."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from ..io.json_types import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    r"""Comparison of a realised change of outputs with the intended one.

    With the intended change $a = D x$ and the realised one $b$ of each row of inputs:

    Args:
        kept: $\sum a b / \sum a^2$, the share of the effect along the intended one; 1 is all of it.
        error: $\sqrt{\sum (b - a)^2 / \sum a^2}$, the relative error; 1 is as large as without the adapter.
        codes_changed: Share of the 4-bit codes that differ from those of the base; None in 16 bits.
        size: $\sum a^2$; 0 if no change was intended.
        kept_rest: `kept` without the first token of each text, whose inputs may be so large that they determine `kept`
            alone; None if it was not measured.
        error_rest: `error` without these tokens.
        kept_even: `kept` with a limit on the weight of large tokens.
        error_even: `error` with the same weights.
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
        """The least value of `kept` over all weightings of tokens; limits apply to it."""
        return min(one for one in (self.kept, self.kept_rest, self.kept_even) if one is not None)

    @property
    def most_error(self) -> float:
        """The largest error over all weightings of tokens; limits apply to it."""
        return max(one for one in (self.error, self.error_rest, self.error_even) if one is not None)

    @property
    def overall_error(self) -> float:
        """The root mean square of the errors over all weightings of tokens; the result with the lower one is chosen."""
        errors = [one for one in (self.error, self.error_rest, self.error_even) if one is not None]
        return math.sqrt(sum(one * one for one in errors) / len(errors))

    def document(self) -> JsonObject:
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
    r"""Measure how much of a delta remains.

    Args:
        intended: The delta.
        realised: The new weight minus the base's weight.
        moment: Mean of $x x^\top$ over rows of inputs; None weights all directions equally.
        shift: Change of the bias.
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


def over_modules(modules: list[Fidelity]) -> Fidelity:
    """Return the means of kept (at most 1 per module) and error over modules with an effect, all with equal weight.

    Optional measures are averaged over the modules that have them.
    """
    acting = [one for one in modules if one.size > 0]
    if not acting:
        return Fidelity(kept=1.0, error=0.0)

    def mean(name: str) -> float | None:
        values = [value for one in acting if (value := getattr(one, name)) is not None]
        values = [min(value, 1.0) for value in values] if name.startswith("kept") else values
        return sum(values) / len(values) if values else None

    means = {one.name: mean(one.name) for one in fields(Fidelity) if one.name.startswith(("kept", "error"))}
    return Fidelity(**means)  # type: ignore[arg-type]  # kept and error are known of each
