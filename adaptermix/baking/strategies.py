"""Strategies of writing a delta into a quantised weight, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..algebra import LowRank
from ..errors import InvalidValueError
from ..io.registry import Registry
from ..models.formats import Quantized
from ..options import registries
from .fidelity import Fidelity, fidelity
from .rounding import Inputs, fit

_LARGEST, _HALVINGS = 3.0, 4
"""Largest multiple of a delta to aim at, and number of bisection steps."""
_MARGIN = 0.97
"""Allowed error relative to plain rounding on the rows that codes are fitted to, with a margin for other rows."""
_ENOUGH = 0.98
"""If the delta itself keeps this share of the effect, no larger multiple of it is tried."""
_SETTLED = 0.05
"""Largest relative rounding error allowed when the mean shift is folded into the bias."""
_LEAST_EFFECT = 0.95
"""Share of the effect that a residual LoRA must reach, unless the settings demand more."""
AUTOMATIC = ("requantize", "calibrated")
"""Strategies that `auto` tries before it leaves a module in 16 bits."""
_MORE, _ITERATIONS = 8, 4
"""Oversampling and number of iterations of the randomised decomposition."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Statistics of rows of a module's inputs.

    Args:
        covariance: Second moment about the mean.
        mean: Their mean.
        count: Number of rows.
        rest: Statistics without the first token of each text, if measured. In many models the inputs of this token are
            hundreds of times as large as others (an attention sink), so they dominate statistics of all tokens.
        even: Statistics with the weight of large tokens limited: a row x has the weight min(1, m / |x|^2), with m the
            median of |x|^2 over the longest texts.
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
    """Input statistics of a module on three parts of the calibration texts, which share no text.

    Args:
        fitted: Rows that codes are fitted to.
        chosen: Rows on which results are chosen.
        measured: Rows for measurement. A strategy that adds ranks until enough of the effect remains must keep enough
            on these rows too.
    """

    fitted: Rows
    chosen: Rows
    measured: Rows

    @property
    def is_enough(self) -> bool:
        """Whether each part has rows."""
        return min(self.fitted.count, self.chosen.count, self.measured.count) > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Baked:
    """A quantised module with its delta written in.

    Args:
        weight: Codes and scales.
        shift: Change of the module's bias, if it is used.
        lora: A residual LoRA, if there is one.
    """

    weight: Quantized
    shift: Float[Tensor, " out"] | None = None
    lora: LowRank | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Insertion:
    """A delta to write into a weight.

    Args:
        base: The base's weight.
        delta: The change.
        known: Statistics of the inputs, if measured.
        settle: Maps a change of the module's bias to the change that results after rounding to the bias's dtype; None
            without a bias.
        seed: Seed of random strategies.
        rank: Rank of the delta; None if it has full rank.
        least: Share of the effect that must remain, for strategies that can add ranks.
        most: Largest error for such strategies.
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
        """Return the result of a strategy (cached).

        Raises:
            ValueError: the strategy needs statistics of the inputs, which are missing.
        """
        if strategy not in self.made:
            self.made[strategy] = STRATEGIES[strategy](self)
        return self.made[strategy]

    def automatic(self) -> str | None:
        """Return the strategy without a LoRA that keeps enough of the effect with the least error, or None."""
        if self.known is None or not self.known.is_enough:
            return None
        rows = self.known.chosen
        ways = {title: self.by(title) for title in AUTOMATIC if self.is_enough(self.by(title), self.least)}
        return min(ways, key=lambda title: self.measured(ways[title], rows).most_error, default=None)

    def is_enough(self, baked: Baked, least: float) -> bool:
        """Return whether a result keeps a share within the error limit, on the rows for selection and measurement."""
        parts = (self.known.chosen, self.known.measured) if self.known else ()
        results = [self.measured(baked, rows) for rows in parts]
        return all(one.least_kept >= least and one.most_error <= self.most for one in results) and bool(results)

    def realised(self, baked: Baked) -> Float[Tensor, "out in"]:
        """Return the new weight, with its LoRA if there is one, minus the base's weight."""
        moved = baked.weight.weight() - self.base.weight()
        return moved if baked.lora is None else moved + baked.lora.dense()

    def measured(self, baked: Baked, rows: Rows | None) -> Fidelity:
        """Return how much of the delta remains: in the outputs on some rows, or in the weights without rows."""
        result = on_rows(self.delta, self.realised(baked), rows, shift=baked.shift if rows else None)
        return replace(result, codes_changed=float((baked.weight.codes != self.base.codes).double().mean()))


def on_rows(intended: Tensor, realised: Tensor, rows: Rows | None, *, shift: Tensor | None = None) -> Fidelity:
    """Return how much of a delta remains: in the outputs on rows, under each weighting; in the weights without rows.

    Args:
        intended: The delta, [out in].
        realised: The new weight minus the base's weight, [out in].
        rows: Statistics of the inputs.
        shift: Change of the bias, [out].
    """
    if rows is None:
        return fidelity(intended, realised, None)

    def on(some: Rows) -> Fidelity:
        moment, mean = some.moment.to(intended.device), some.mean.to(intended.device)
        return fidelity(intended, realised, moment, shift=shift, mean=mean)

    result = on(rows)
    if rows.rest is not None:
        rest = on(rows.rest)
        result = replace(result, kept_rest=rest.kept, error_rest=rest.error)
    if rows.even is not None:
        even = on(rows.even)
        result = replace(result, kept_even=even.kept, error_even=even.error)
    return result


Strategy = Callable[[Insertion], Baked]


def requantize(insertion: Insertion) -> Baked:
    """Add the delta to the dequantised weight and round to the nearest code, as merging into a quantised model does."""
    return Baked(weight=insertion.base.requantized(insertion.base.weight() + insertion.delta))


def stochastic(insertion: Insertion) -> Baked:
    """Round each weight up or down at random, so that the delta is exact on average; needs no inputs.

    The base's scales are kept, so values beyond them are clipped.
    """
    (table, code_of), scales = insertion.base.table.sort(), insertion.base.scale_of_each()
    aim = (insertion.base.weight() + insertion.delta) / scales
    below = (torch.searchsorted(table, aim, right=True) - 1).clamp(0, len(table) - 2)
    share = (aim - table[below]) / (table[below + 1] - table[below])
    draw = torch.rand(share.shape, generator=torch.Generator().manual_seed(insertion.seed)).to(share.device)
    return Baked(weight=insertion.base.with_codes(code_of[below + (draw < share)]))


def calibrated(insertion: Insertion) -> Baked:
    """Choose codes and scales whose outputs on the calibration inputs contain the effect of the delta, see `rounding`.

    Steps between codes are coarse, so the codes with the nearest outputs keep less than the whole effect. They are
    therefore fitted to a multiple of the delta: the one that keeps the share nearest to 1 with an error below that of
    plain rounding. A bias, if there is one, absorbs the mean. Plain rounding is the result if it is better on the rows
    for selection.

    Raises:
        ValueError: there are no statistics of the inputs.
    """
    known = _known(insertion)
    plain = insertion.by("requantize")
    limit = _MARGIN * insertion.measured(plain, known.fitted).error
    best = _nearest(insertion, known, limit)
    on_choice = insertion.measured(best, known.chosen).overall_error
    return best if on_choice < insertion.measured(plain, known.chosen).overall_error else plain


def residual(insertion: Insertion) -> Baked:
    """Add a LoRA of small rank that carries the part of the delta that the codes do not.

    The LoRA of a rank is the one with the largest effect on the calibration inputs (a singular value decomposition,
    weighted by the root of their second moment). Candidates for each rank: a LoRA of the delta with the codes of the
    base; a LoRA of the error of the codes of `calibrated`; and a LoRA of the delta with the codes that `calibrated`
    chooses for the rest. Ranks double until the effect reaches the required share, at least 0.95, within the error
    limit; the candidate with the least error is used. At the rank of the delta the LoRA is the delta itself.

    Raises:
        ValueError: there are no statistics of the inputs.

    References: Yao et al., ZeroQuant-V2 (low-rank compensation), 2023, arXiv 2303.08302; Zhang et al., QERA, ICLR 2025,
    arXiv 2410.06040 (the weighting).
    """
    known, aim = _known(insertion), max(insertion.least, _LEAST_EFFECT)

    def enough(ways: Iterable[Baked]) -> list[Baked]:
        return [way for way in ways if insertion.is_enough(way, aim)]

    base, codes = Baked(weight=insertion.base), insertion.by("calibrated")
    if enough([codes]):
        return codes
    full = insertion.rank or min(insertion.delta.shape)
    rank = 1
    while 2 * rank <= full:
        plain = _with_lora(insertion, known, base, rank)
        good = enough([plain, _with_lora(insertion, known, codes, rank)])
        good = good or enough([_with_lora(insertion, known, _codes_for_rest(insertion, plain), rank)])
        if good:
            return min(good, key=lambda way: insertion.measured(way, known.chosen).most_error)
        rank *= 2
    return Baked(weight=insertion.base, lora=leading(insertion.delta, known.fitted.moment, full))


def _known(insertion: Insertion) -> Known:
    if insertion.known is None or not insertion.known.is_enough:
        raise InvalidValueError(
            "codes are chosen for the inputs of a module, so calibration texts of all three parts (fitting, "
            "selection, measurement) must reach it, and they do not",
            code="bake.no-inputs",
        )
    return insertion.known


def _with_lora(insertion: Insertion, known: Known, codes: Baked, rank: int) -> Baked:
    """Return codes with the LoRA that absorbs most of their error, and the resulting bias."""
    rows = known.fitted
    settle = insertion.settle if _settles(insertion, rows) else None
    rest = insertion.delta - (codes.weight.weight() - insertion.base.weight())
    lora = leading(rest, rows.covariance if settle else rows.moment, rank)
    shift = settle((rest - lora.dense()) @ rows.mean) if settle else None
    return Baked(weight=codes.weight, shift=shift, lora=lora)


def _codes_for_rest(insertion: Insertion, plain: Baked) -> Baked:
    """Return the result of `calibrated` for the part of the delta that a LoRA does not contain."""
    if plain.lora is None:
        return plain
    made = f"codes for rank {plain.lora.rank}"
    if made not in insertion.made:
        insertion.made[made] = calibrated(replace(insertion, delta=insertion.delta - plain.lora.dense()))
    return insertion.made[made]


def leading(matrix: Tensor, moment: Tensor, rank: int) -> LowRank:
    r"""Return the matrix of a given rank with the closest outputs: $U U^\top M$, with U of the weighted matrix."""
    root = Inputs(moment=moment).unordered_root
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)  # the decomposition starts with random directions
        left, _, _ = torch.svd_lowrank(matrix @ root, q=min(rank + _MORE, *matrix.shape), niter=_ITERATIONS)
    left = left[:, :rank].contiguous()
    right = left.T @ matrix
    # Balance the factors' sizes, since half precision has a narrow range.
    size = torch.linalg.vector_norm(right, dim=1).clamp(min=torch.finfo(right.dtype).tiny).sqrt()
    return LowRank(b=left * size, a=right / size[:, None])


def _nearest(insertion: Insertion, known: Known, limit: float) -> Baked:
    before, rows = insertion.base.weight(), known.fitted
    settle = insertion.settle if _settles(insertion, rows) else None
    inputs = Inputs(moment=rows.covariance if settle else rows.moment)

    def aimed(stretch: float) -> tuple[Fidelity, Baked]:
        form = fit(insertion.base, before + stretch * insertion.delta, inputs)
        shift = settle((insertion.delta - (form.weight() - before)) @ rows.mean) if settle else None
        baked = Baked(weight=form, shift=shift)
        return insertion.measured(baked, rows), baked

    tried = [aimed(1.0)]
    low, high = 1.0, _LARGEST
    for _ in range(_HALVINGS if tried[0][0].kept < _ENOUGH else 0):
        middle = (low + high) / 2
        tried.append(aimed(middle))
        too_far = tried[-1][0].kept > 1 or tried[-1][0].error > limit
        low, high = (low, middle) if too_far else (middle, high)
    within = [one for one in tried if one[0].error <= limit] or tried[:1]
    return min(within, key=lambda one: abs(one[0].kept - 1))[1]


def _settles(insertion: Insertion, rows: Rows) -> bool:
    """Return whether the bias, in its storage dtype, can absorb the mean of the delta."""
    if insertion.settle is None:
        return False
    aim = insertion.delta @ rows.mean
    return float((insertion.settle(aim) - aim).norm()) <= _SETTLED * float(aim.norm())


STRATEGIES: Registry[Strategy] = registries.STRATEGIES
"""Strategies by name. Entry points of other packages: `adaptermix.strategies`."""
STRATEGIES.update(requantize=requantize, stochastic=stochastic, calibrated=calibrated, residual=residual)
