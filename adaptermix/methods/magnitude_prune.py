"""Magnitude pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra.operators import Gain, Operator, Total, Trim, Weigh
from .base import method, require_share
from .space import SpaceMethod


@method("magnitude-prune")
@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudePrune(SpaceMethod):
    r"""Weighted sum of the deltas, each without its small entries.

    $\Delta = \lambda \sum_i w_i \, trim(\tau_i, density)$.

    Args:
        density: Share of entries kept per module, in (0, 1]; the count is rounded down, and at least one.
        gain: $\lambda$, a factor on the result.
        space: "core" merges the matrices $M_i$ of $\tau_i = U M_i V^T$ (`space` in `ties`).

    Shapes: k updates [out in] give one [out in], dense or, in core space, of low rank.
    Exact when: density is 1.
    Reference: Han et al., Learning both Weights and Connections, NeurIPS 2015, arXiv 1506.02626, section 3; peft,
    `magnitude_prune_svd`.
    """

    factor: ClassVar[str | None] = "gain"

    density: float = 0.2
    gain: float = 1.0

    def __post_init__(self) -> None:
        require_share("density", self.density)

    def operators(self) -> Sequence[Operator]:
        """Return the chain."""
        return Trim(density=self.density), Weigh(), Total(), Gain(factor=self.gain)
