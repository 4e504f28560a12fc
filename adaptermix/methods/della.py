"""DELLA: drop small entries more often, rescale, elect, fuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra.operators import DropByMagnitude, Gain, Operator, Total, Weigh
from ..errors import InvalidValueError
from .base import method, require_share
from .space import SpaceMethod
from .ties import Order, consensus


@method("della")
@dataclass(frozen=True, slots=True, kw_only=True)
class Della(SpaceMethod):
    r"""Drop entries at random by their rank in the row, rescale, then merge without sign conflicts.

    In a row of n entries, the one of rank j by size (0 the smallest) is kept with probability
    $p_j = density + epsilon (j/(n-1) - 1/2)$ and divided by it; then TIES' election and mean.

    Args:
        density: Mean probability of being kept; density +- epsilon/2 must lie in (0, 1].
        epsilon: Width of the window of probabilities.
        gain: $\lambda$, a factor on the result.
        elect: Drop sign conflicts; if not, a weighted sum (mergekit's `della_linear`).
        order: As in `ties`.
        normalize: Divide by the survivors.
        space: "core" merges the matrices $M_i$ of $\tau_i = U M_i V^T$ (`space` in `ties`).

    Shapes: k updates [out in] give one [out in], dense or, in core space, of low rank; rows are those of the weight
        matrix, one per output, or those of $M_i$.
    Differs from the paper: given as probabilities of being kept. mergekit's window is density +- epsilon, twice as
    wide, and it rescales by the ratio of the L1 norms instead of 1/p per entry.
    Exact when: density is 1, epsilon 0 and no signs conflict.
    Reference: Deep, Bhardwaj and Poria, DELLA-Merging, 2024, arXiv 2406.11617, section 3.
    """

    factor: ClassVar[str | None] = "gain"
    is_random: ClassVar[bool] = True
    density: float = 0.5
    epsilon: float = 0.15
    gain: float = 1.0
    elect: bool = True
    order: Order = "elect-first"
    normalize: bool = True

    def __post_init__(self) -> None:
        require_share("density", self.density)
        if not (self.epsilon >= 0 and self.density - self.epsilon / 2 > 0 and self.density + self.epsilon / 2 <= 1):
            raise InvalidValueError(
                f"density +- epsilon/2 must lie in (0, 1], got density {self.density!r} and epsilon {self.epsilon!r}",
                code="method.density",
            )
        self.operators()

    def operators(self) -> Sequence[Operator]:
        """Return the chain."""
        drop = DropByMagnitude(density=self.density, epsilon=self.epsilon)
        if self.elect:
            return (drop, *consensus(self.order, normalize=self.normalize, gain=self.gain))
        return drop, Weigh(), Total(), Gain(factor=self.gain)
