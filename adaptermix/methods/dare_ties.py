"""DARE, then TIES' election and mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra.operators import Drop, Operator
from .base import method, require_share
from .space import SpaceMethod
from .ties import Order, consensus


@method("dare-ties")
@dataclass(frozen=True, slots=True, kw_only=True)
class DareTies(SpaceMethod):
    r"""Drop and rescale each delta, then merge without sign conflicts.

    $\hat\tau_i = m_i \odot \tau_i / density$ with $m_i \sim Bernoulli(density)$, then TIES without its trimming.

    Args:
        density: Probability of being kept, in (0, 1].
        gain: $\lambda$, a factor on the result.
        order: As in `ties`.
        normalize: Divide by the survivors (PEFT does, mergekit does not).
        space: "core" merges the matrices $M_i$ of $\tau_i = U M_i V^T$ (`space` in `ties`).

    Shapes: k updates [out in] give one [out in], dense or, in core space, of low rank.
    Exact when: density is 1 and no signs conflict.
    Reference: Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099, section 3.3; Yadav et al.,
    TIES-Merging, NeurIPS 2023, arXiv 2306.01708, section 4.
    """

    factor: ClassVar[str | None] = "gain"
    is_random: ClassVar[bool] = True
    density: float = 0.5
    gain: float = 1.0
    order: Order = "elect-first"
    normalize: bool = True

    def __post_init__(self) -> None:
        require_share("density", self.density)
        self.operators()

    def operators(self) -> Sequence[Operator]:
        """Return the chain."""
        return Drop(density=self.density), *consensus(self.order, normalize=self.normalize, gain=self.gain)
