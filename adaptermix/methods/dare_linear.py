"""DARE: drop and rescale, then add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra.operators import Drop, Gain, Operator, Total, Weigh
from .base import method, require_share
from .space import SpaceMethod


@method("dare-linear")
@dataclass(frozen=True, slots=True, kw_only=True)
class DareLinear(SpaceMethod):
    r"""Weighted sum of the deltas, each with random entries dropped and the others enlarged.

    $\Delta = \lambda \sum_i w_i \, m_i \odot \tau_i / density$ with $m_i \sim Bernoulli(density)$, so the expectation
    is that of task arithmetic.

    Args:
        density: Probability of being kept, in (0, 1]; the paper's drop rate is p = 1 - density.
        gain: $\lambda$, a factor on the result.
        space: "core" merges the matrices $M_i$ of $\tau_i = U M_i V^T$ (`space` in `ties`).

    Shapes: k updates [out in] give one [out in], dense or, in core space, of low rank.
    Differs from the paper: nothing; mergekit rescales by the ratio of the L1 norms instead of 1/density. Masks are
    drawn for the delta: dropping entries of the factors removes rank-one pieces, and is not DARE.
    Exact when: density is 1.
    Reference: Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099, section 3.
    """

    factor: ClassVar[str | None] = "gain"
    is_random: ClassVar[bool] = True
    density: float = 0.5
    gain: float = 1.0

    def __post_init__(self) -> None:
        require_share("density", self.density)

    def operators(self) -> Sequence[Operator]:
        """Return the chain."""
        return Drop(density=self.density), Weigh(), Total(), Gain(factor=self.gain)
