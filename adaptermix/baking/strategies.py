"""Ways to write a delta into a quantised weight, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..algebra import LowRank
from ..checkpoints.formats import Quantized
from ..io.registry import Registry
from ..options import registries
from .fidelity import Fidelity, fidelity
from .rounding import Inputs, fit

_LARGEST, _HALVINGS = 3.0, 4
"""Largest multiple of a delta to aim at, and how often the way there is halved."""
_MARGIN = 0.97
"""Share of the error of plain rounding that is allowed on the rows codes are fitted to, so that it holds on others."""
_ENOUGH = 0.98
"""Share of the effect that need not be made larger."""
_SETTLED = 0.05
"""Share of a shift that its bias may round away."""
_REPAID = 0.95
"""Share of the effect that a LoRA beside the codes makes up for, unless more is asked for."""
AUTOMATIC = ("requantize", "calibrated")
"""What `auto` tries before it leaves a module in 16 bits."""
_MORE, _ITERATIONS = 8, 4
"""Directions beyond those that are wanted, and rounds, of a randomized decomposition."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What is known of rows of a module's inputs.

    Args:
        covariance: Second moment about the mean.
        mean: Their mean.
        count: How many there were.
        rest: The same without the first token of each text, if that is known. Many models give this token inputs that
            are hundreds of times as large as others (an attention sink), so it alone decides what is measured on all.
        even: The same where no token counts more than one of usual size: a row x has the weight min(1, m / |x|^2), with
            m the median of |x|^2 over the longest texts.
    """

    covariance: Float[Tensor, "in in"]
    mean: Float[Tensor, " in"]
    count: int
    rest: Rows | None = None
    even: Rows | None = None

    @property
    def moment(self) -> Float[Tensor, "in in"]:
        r"""Return the mean of $x x^\top$."""
        return self.covariance + torch.outer(self.mean, self.mean)


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What calibration texts tell of a module's inputs: three parts of them that share no text.

    Args:
        fitted: Rows that codes are fitted to.
        chosen: Rows on which results are chosen.
        held: Rows that have no part in either, on which what is kept is measured. Where a strategy spends more until
            enough is kept, these must keep it too.
    """

    fitted: Rows
    chosen: Rows
    held: Rows

    @property
    def is_enough(self) -> bool:
        """Whether each part has rows."""
        return min(self.fitted.count, self.chosen.count, self.held.count) > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Baked:
    """A quantised module with its delta written in.

    Args:
        weight: Codes and scales.
        shift: What is to be added to the module's bias, if it takes part.
        beside: A LoRA that stays beside the module, if there is one.
    """

    weight: Quantized
    shift: Float[Tensor, " out"] | None = None
    beside: LowRank | None = None


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
        rank: Rank of the delta; None if it has all.
        least: Share of the effect that must be kept, for strategies that spend more on more.
        most: Error that such strategies may leave.
    """

    base: Quantized
    delta: Float[Tensor, "out in"]
    known: Known | None = None
    settle: Callable[[Tensor], Tensor] | None = None
    seed: int = 0
    rank: int | None = None
    least: float = 0.0
    most: float = float("inf")
    made: dict[str, Baked] = field(default_factory=dict, init=False)

    def by(self, strategy: str) -> Baked:
        """Return what a strategy gives, worked out once.

        Raises:
            ValueError: the strategy needs to know the inputs, and nothing is known.
        """
        if strategy not in self.made:
            self.made[strategy] = STRATEGIES[strategy](self)
        return self.made[strategy]

    def automatic(self) -> str | None:
        """Return which of the ways that keep enough in codes alone has the least error; None where none does."""
        if self.known is None or not self.known.is_enough:
            return None
        rows = self.known.chosen
        ways = {title: self.by(title) for title in AUTOMATIC if self.is_enough(self.by(title), self.least)}
        return min(ways, key=lambda title: self.measured(ways[title], rows).most_error, default=None)

    def is_enough(self, found: Baked, least: float) -> bool:
        """Whether a result keeps a share and is not too far off, on the rows to choose on and on the others alike."""
        parts = (self.known.chosen, self.known.held) if self.known else ()
        results = [self.measured(found, rows) for rows in parts]
        return all(one.least_kept >= least and one.most_error <= self.most for one in results) and bool(results)

    def realised(self, found: Baked) -> Float[Tensor, "out in"]:
        """Return by how much a result differs from the base, its LoRA included."""
        moved = found.weight.weight() - self.base.weight()
        return moved if found.beside is None else moved + found.beside.dense()

    def measured(self, found: Baked, rows: Rows | None) -> Fidelity:
        """Return what is left of the delta on some rows, or on weights where none are given."""
        result = on_rows(self.delta, self.realised(found), rows, shift=found.shift if rows else None)
        return replace(result, codes_changed=float((found.weight.codes != self.base.codes).double().mean()))


def on_rows(intended: Tensor, realised: Tensor, rows: Rows | None, *, shift: Tensor | None = None) -> Fidelity:
    """Return what is left of a delta on rows of inputs, by each way to count them; on weights where none are given.

    Args:
        intended: The delta, [out in].
        realised: The difference of the weight that is there now from that of the base, [out in].
        rows: What is known of the inputs.
        shift: What was added to the bias, [out].
    """
    if rows is None:
        return fidelity(intended, realised, None)

    def on(some: Rows) -> Fidelity:
        moment, mean = some.moment.to(intended.device), some.mean.to(intended.device)
        return fidelity(intended, realised, moment, shift=shift, mean=mean)

    found = on(rows)
    if rows.rest is not None:
        rest = on(rows.rest)
        found = replace(found, kept_rest=rest.kept, error_rest=rest.error)
    if rows.even is not None:
        even = on(rows.even)
        found = replace(found, kept_even=even.kept, error_even=even.error)
    return found


Strategy = Callable[[Wanted], Baked]


def requantize(wanted: Wanted) -> Baked:
    """Add the delta to what the codes stand for and round to the nearest again, as merging into such a model does."""
    return Baked(weight=wanted.base.requantized(wanted.base.weight() + wanted.delta))


def stochastic(wanted: Wanted) -> Baked:
    """Round each weight up or down by chance, so that on average the delta is there; needs no inputs.

    The scales are those of the base, so what lies beyond them is cut.
    """
    (table, code_of), scales = wanted.base.table.sort(), wanted.base.scale_of_each()
    aim = (wanted.base.weight() + wanted.delta) / scales
    below = (torch.searchsorted(table, aim, right=True) - 1).clamp(0, len(table) - 2)
    share = (aim - table[below]) / (table[below + 1] - table[below])
    draw = torch.rand(share.shape, generator=torch.Generator().manual_seed(wanted.seed)).to(share.device)
    return Baked(weight=wanted.base.with_codes(code_of[below + (draw < share)]))


def calibrated(wanted: Wanted) -> Baked:
    """Choose codes and scales whose outputs carry the delta on the inputs that occur, see `rounding`.

    Steps between codes are coarse, so the nearest outputs carry less than the whole delta. A multiple of it is aimed
    at: that which carries most nearly all of it while the error stays below that of plain rounding. Where there is a
    bias it takes up the mean. Plain rounding is the result where it is nearer on the rows to choose on.

    Raises:
        ValueError: nothing is known of the inputs.
    """
    known = _known(wanted)
    plain = wanted.by("requantize")
    limit = _MARGIN * wanted.measured(plain, known.fitted).error
    found = _nearest(wanted, known, limit)
    on_choice = wanted.measured(found, known.chosen).overall_error
    return found if on_choice < wanted.measured(plain, known.chosen).overall_error else plain


def residual(wanted: Wanted) -> Baked:
    """Put a LoRA of small rank beside codes, which carries what they do not.

    The LoRA is the part of largest effect on the inputs that occur (a singular value decomposition after weighting by
    the root of their second moment): of the delta itself, beside the codes of the base or those that `calibrated`
    chooses for the rest, or of what the codes of `calibrated` have lost. Ranks double until as much is kept as must be,
    at least 0.95, and the error is no larger than it may be; of the ways that do that of least error is taken. At the
    rank of the delta the LoRA is the delta.

    Raises:
        ValueError: nothing is known of the inputs.

    References: Yao et al., ZeroQuant-V2 (low-rank compensation), 2023, arXiv 2303.08302; Zhang et al., QERA, ICLR 2025,
    arXiv 2410.06040 (the weighting).
    """
    known, aim = _known(wanted), max(wanted.least, _REPAID)

    def enough(ways: Iterable[Baked]) -> list[Baked]:
        return [way for way in ways if wanted.is_enough(way, aim)]

    base, codes = Baked(weight=wanted.base), wanted.by("calibrated")
    if enough([codes]):
        return codes
    full = wanted.rank or min(wanted.delta.shape)
    rank = 1
    while 2 * rank <= full:
        plain = _repaid(wanted, known, base, rank)
        found = enough([plain, _repaid(wanted, known, codes, rank)])
        found = found or enough([_repaid(wanted, known, _around(wanted, plain), rank)])
        if found:
            return min(found, key=lambda way: wanted.measured(way, known.chosen).most_error)
        rank *= 2
    return Baked(weight=wanted.base, beside=leading(wanted.delta, known.fitted.moment, full))


def _known(wanted: Wanted) -> Known:
    if wanted.known is None or not wanted.known.is_enough:
        raise ValueError(
            "codes are chosen for the inputs that occur, so texts of all three parts (to fit to, to choose on, to "
            "measure on) must reach the module, and do not"
        )
    return wanted.known


def _repaid(wanted: Wanted, known: Known, codes: Baked, rank: int) -> Baked:
    """Return codes with the LoRA that takes up most of their error, and the bias after it."""
    rows = known.fitted
    settle = wanted.settle if _settles(wanted, rows) else None
    rest = wanted.delta - (codes.weight.weight() - wanted.base.weight())
    beside = leading(rest, rows.covariance if settle else rows.moment, rank)
    shift = settle((rest - beside.dense()) @ rows.mean) if settle else None
    return Baked(weight=codes.weight, shift=shift, beside=beside)


def _around(wanted: Wanted, found: Baked) -> Baked:
    """Choose the codes for what a LoRA leaves."""
    if found.beside is None:
        return found
    made = f"codes beside rank {found.beside.rank}"
    if made not in wanted.made:
        wanted.made[made] = calibrated(replace(wanted, delta=wanted.delta - found.beside.dense()))
    return wanted.made[made]


def leading(matrix: Tensor, moment: Tensor, rank: int) -> LowRank:
    r"""Return the matrix of a rank that is nearest to another in outputs: $U U^\top M$, with U of the weighted one."""
    root = Inputs(moment=moment).unordered_root
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)  # the decomposition begins with random directions
        left, _, _ = torch.svd_lowrank(matrix @ root, q=min(rank + _MORE, *matrix.shape), niter=_ITERATIONS)
    left = left[:, :rank].contiguous()
    right = left.T @ matrix
    # factors of like size, as half floats have a narrow range
    size = torch.linalg.vector_norm(right, dim=1).clamp(min=torch.finfo(right.dtype).tiny).sqrt()
    return LowRank(b=left * size, a=right / size[:, None])


def _nearest(wanted: Wanted, known: Known, limit: float) -> Baked:
    before, rows = wanted.base.weight(), known.fitted
    settle = wanted.settle if _settles(wanted, rows) else None
    inputs = Inputs(moment=rows.covariance if settle else rows.moment)

    def aimed(stretch: float) -> tuple[Fidelity, Baked]:
        found = fit(wanted.base, before + stretch * wanted.delta, inputs)
        shift = settle((wanted.delta - (found.weight() - before)) @ rows.mean) if settle else None
        baked = Baked(weight=found, shift=shift)
        return wanted.measured(baked, rows), baked

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


STRATEGIES: Registry[Strategy] = registries.STRATEGIES
"""Strategies by name. Entry points of other packages: `adaptermix.strategies`."""
STRATEGIES.update(requantize=requantize, stochastic=stochastic, calibrated=calibrated, residual=residual)
