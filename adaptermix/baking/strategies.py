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
_SETTLED = 0.05
"""Share of a shift that its bias may round away."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What is known of rows of a module's inputs.

    Args:
        spread: Second moment about the mean.
        mean: Their mean.
        count: How many there were.
    """

    spread: Float[Tensor, "in in"]
    mean: Float[Tensor, " in"]
    count: int

    @property
    def moment(self) -> Float[Tensor, "in in"]:
        r"""Return the mean of $x x^\top$."""
        return self.spread + torch.outer(self.mean, self.mean)


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What calibration texts tell of a module's inputs: three parts of them that share no text.

    Args:
        fitted: Rows that codes are fitted to.
        chosen: Rows on which results are chosen.
        held: Rows that have no part in either, on which what is kept is measured.
    """

    fitted: Rows
    chosen: Rows
    held: Rows

    @property
    def is_enough(self) -> bool:
        """Whether each part has rows."""
        return min(self.fitted.count, self.chosen.count, self.held.count) > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """A delta to write into a weight.

    Args:
        base: The weight as the base has it.
        delta: What is to be added.
        known: What is known of the inputs, if anything.
        settle: From what is to be added to the module's bias to what will have been, as the bias is stored; None
            without a bias.
        seed: Seed of strategies that draw.
    """

    base: FourBit
    delta: Float[Tensor, "out in"]
    known: Known | None = None
    settle: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def measured(self, found: FourBit, rows: Rows | None, shift: Tensor | None = None) -> Fidelity:
        """Return what is left of the delta on some rows, or on weights where none are given."""
        changed = float((found.codes != self.base.codes).double().mean())
        return fidelity(
            self.delta,
            found.weight() - self.base.weight(),
            rows.moment if rows else None,
            shift=shift,
            mean=rows.mean if rows else None,
            codes_changed=changed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Baked:
    """A module in 4 bits with its delta written in.

    Args:
        weight: Codes and scales.
        shift: What is to be added to the module's bias, if it takes part.
    """

    weight: FourBit
    shift: Float[Tensor, " out"] | None = None


Strategy = Callable[[Wanted], Baked]


def requantize(wanted: Wanted) -> Baked:
    """Add the delta to what the codes stand for and round to the nearest again, as merging into such a model does."""
    state = wanted.base.state
    found = quantize(wanted.base.weight() + wanted.delta, kind=state.quant_type, double=state.nested)
    return Baked(weight=found)


def stochastic(wanted: Wanted) -> Baked:
    """Round each weight up or down by chance, so that on average the delta is there; needs no inputs.

    The scales are those of the base, so what lies beyond them is cut.
    """
    (table, code_of), scales = wanted.base.table.sort(), wanted.base.scale_of_each()
    aim = (wanted.base.weight() + wanted.delta) / scales
    below = (torch.searchsorted(table, aim, right=True) - 1).clamp(0, len(table) - 2)
    share = (aim - table[below]) / (table[below + 1] - table[below])
    draw = torch.rand(share.shape, generator=torch.Generator().manual_seed(wanted.seed)).to(share.device)
    return Baked(weight=with_codes(wanted.base, code_of[below + (draw < share)]))


def calibrated(wanted: Wanted) -> Baked:
    """Choose codes and scales whose outputs carry the delta on the inputs that occur, see `rounding`.

    Steps between codes are coarse, so the nearest outputs carry less than the whole delta. A multiple of it is aimed
    at: that which carries most nearly all of it while the error stays below that of plain rounding. Where there is a
    bias it takes up the mean. Plain rounding is the result where it is nearer on the rows to choose on.

    Raises:
        ValueError: nothing is known of the inputs.
    """
    known = wanted.known
    if known is None or not known.is_enough:
        raise ValueError("codes are chosen for the inputs that occur, and none are known")
    plain = requantize(wanted)
    limit = _MARGIN * wanted.measured(plain.weight, known.fitted).error
    found = _nearest(wanted, known, limit)
    on_choice = wanted.measured(found.weight, known.chosen, found.shift).error
    return found if on_choice < wanted.measured(plain.weight, known.chosen).error else plain


def _nearest(wanted: Wanted, known: Known, limit: float) -> Baked:
    before, rows = wanted.base.weight(), known.fitted
    settle = wanted.settle if _settles(wanted, rows) else None
    inputs = Inputs(moment=rows.spread if settle else rows.moment)

    def aimed(stretch: float) -> tuple[Fidelity, Baked]:
        found = fit(wanted.base, before + stretch * wanted.delta, inputs)
        shift = settle((wanted.delta - (found.weight() - before)) @ rows.mean) if settle else None
        return wanted.measured(found, rows, shift), Baked(weight=found, shift=shift)

    tried = [aimed(1.0)]
    low, high = 1.0, _LARGEST
    for _ in range(_HALVINGS if tried[0][0].kept < _ENOUGH else 0):
        middle = (low + high) / 2
        tried.append(aimed(middle))
        too_far = tried[-1][0].kept > 1 or tried[-1][0].error > limit
        low, high = (low, middle) if too_far else (middle, high)
    within = [one for one in tried if one[0].error <= limit] or tried[:1]
    return min(within, key=lambda one: abs(one[0].kept - 1))[1]


def _settles(wanted: Wanted, rows: Rows) -> bool:
    """Whether the bias, as it is stored, can take up the mean of the delta."""
    if wanted.settle is None:
        return False
    aim = wanted.delta @ rows.mean
    return float((wanted.settle(aim) - aim).norm()) <= _SETTLED * float(aim.norm())


STRATEGIES: dict[str, Strategy] = {"requantize": requantize, "stochastic": stochastic, "calibrated": calibrated}
