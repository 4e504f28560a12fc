"""Ways to write a delta into a weight in 4 bits, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .fidelity import Fidelity, fidelity
from .grid import FourBit, quantize, with_codes
from .rounding import Inputs, fit

_LARGEST, _HALVINGS = 3.0, 4
"""Largest multiple of a delta to aim at, and how often the way there is halved."""
_MARGIN = 0.97
"""Share of the error of plain rounding that is allowed on the rows codes are fitted to, so that it holds on others."""
_ENOUGH = 0.98
"""Share of the effect that need not be made larger."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    r"""What calibration texts tell of a module's inputs.

    Args:
        moment: Mean of $x x^\top$ over the rows that codes are fitted to.
        mean: Mean of x over them.
        held_moment: The same of rows that had no part in it, on which what is kept is measured.
        held_mean: Their mean.
    """

    moment: Float[Tensor, "in in"]
    mean: Float[Tensor, " in"]
    held_moment: Float[Tensor, "in in"]
    held_mean: Float[Tensor, " in"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Baked:
    """A module in 4 bits with its delta written in.

    Args:
        weight: Codes and scales.
        fidelity: What is left of the delta, on rows that had no part in choosing them.
        shift: What is to be added to the module's bias, if it has one and takes part.
    """

    weight: FourBit
    fidelity: Fidelity
    shift: Float[Tensor, " out"] | None = None


Strategy = Callable[[FourBit, Float[Tensor, "out in"], Known | None, bool], Baked]
"""From the base's weight, the delta, what is known of inputs, and whether there is a bias, to the module."""


def _measured(
    base: FourBit, found: FourBit, delta: Tensor, known: Known | None, shift: Tensor | None = None
) -> Fidelity:
    changed = float((found.codes != base.codes).double().mean())
    moment, mean = (known.held_moment, known.held_mean) if known else (None, None)
    return fidelity(delta, found.weight() - base.weight(), moment, shift=shift, mean=mean, codes_changed=changed)


def requantize(base: FourBit, delta: Tensor, known: Known | None, _has_bias: bool) -> Baked:
    """Add the delta to what the codes stand for and round to the nearest again, as merging into such a model does."""
    found = quantize(base.weight() + delta, kind=base.state.quant_type, double=base.state.nested)
    return Baked(weight=found, fidelity=_measured(base, found, delta, known))


def stochastic(base: FourBit, delta: Tensor, known: Known | None, _has_bias: bool) -> Baked:
    """Round each weight up or down by chance, so that on average all of the delta is there; needs no inputs.

    The scales are those of the base. Draws are the same each time.
    """
    (table, code_of), scales = base.table.sort(), base.scale_of_each()
    wanted = (base.weight() + delta) / scales
    below = (torch.searchsorted(table, wanted, right=True) - 1).clamp(0, len(table) - 2)
    share = (wanted - table[below]) / (table[below + 1] - table[below])
    draw = torch.rand(share.shape, generator=torch.Generator().manual_seed(0)).to(share.device)
    found = with_codes(base, code_of[below + (draw < share)])
    return Baked(weight=found, fidelity=_measured(base, found, delta, known))


def calibrated(base: FourBit, delta: Tensor, known: Known | None, has_bias: bool) -> Baked:
    """Choose codes and scales whose outputs carry the delta on the inputs that occur, see `rounding`.

    Steps between codes are coarse, so the nearest outputs carry less than the whole delta. A multiple of it is aimed
    at: that which carries most nearly all of it while the error stays below that of plain rounding. Where there
    is a bias it takes up the mean.

    Raises:
        ValueError: nothing is known of the inputs.
    """
    if known is None:
        raise ValueError("codes are chosen for the inputs that occur, and none are known")
    moment = known.moment - torch.outer(known.mean, known.mean) if has_bias else known.moment
    inputs = Inputs(moment=moment)
    before = base.weight()
    naive = quantize(before + delta, kind=base.state.quant_type, double=base.state.nested).weight() - before
    limit = _MARGIN * fidelity(delta, naive, known.moment).error

    def aimed(stretch: float) -> tuple[Fidelity, FourBit, Tensor | None]:
        found = fit(base, before + stretch * delta, inputs)
        realised = found.weight() - before
        shift = (delta - realised) @ known.mean if has_bias else None
        return fidelity(delta, realised, known.moment, shift=shift, mean=known.mean), found, shift

    tried = [aimed(1.0)]
    low, high = 1.0, _LARGEST
    for _ in range(_HALVINGS if tried[0][0].kept < _ENOUGH else 0):
        middle = (low + high) / 2
        tried.append(aimed(middle))
        too_far = tried[-1][0].kept > 1 or tried[-1][0].error > limit
        low, high = (low, middle) if too_far else (middle, high)
    within = [one for one in tried if one[0].error <= limit] or tried[:1]
    _, found, shift = min(within, key=lambda one: abs(one[0].kept - 1))
    return Baked(weight=found, fidelity=_measured(base, found, delta, known, shift), shift=shift)


STRATEGIES: dict[str, Strategy] = {"requantize": requantize, "stochastic": stochastic, "calibrated": calibrated}
