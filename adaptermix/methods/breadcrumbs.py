"""Model Breadcrumbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra.operators import Gain, Operator, Total, Trim, Weigh
from ..errors import InvalidValueError
from .base import method, require_share
from .space import SpaceMethod
from .ties import consensus


@method("breadcrumbs")
@dataclass(frozen=True, slots=True, kw_only=True)
class Breadcrumbs(SpaceMethod):
    r"""Weighted sum of the deltas, each without its largest and its small entries.

    $\Delta = \lambda \sum_i w_i \, m_i \odot \tau_i$, where $m_i$ drops the `outliers` share of largest entries and
    keeps the `density` share after them.

    Args:
        density: Share of entries kept per module, in (0, 1].
        outliers: Share of the largest entries dropped ($1 - \gamma$ in the paper), in [0, 1); rounded down, possibly
            to none. The two shares must sum to 1 at most; mergekit drops fewer outliers where they do not.
        gain: $\lambda$, a factor on the result ($\alpha$ in the paper).
        elect: Drop sign conflicts as well (mergekit's `breadcrumbs_ties`, not normalised).
        space: "core" merges the matrices $M_i$ of $\tau_i = U M_i V^T$ (`space` in `ties`).

    Shapes: k updates [out in] give one [out in], dense or, in core space, of low rank.
    Differs from the paper: shares are given as kept and dropped, not as two quantiles.
    Exact when: density is 1 and outliers 0.
    Reference: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795, section 3.
    """

    factor: ClassVar[str | None] = "gain"

    density: float = 0.15
    outliers: float = 0.01
    gain: float = 1.0
    elect: bool = False

    def __post_init__(self) -> None:
        require_share("density", self.density)
        if not 0 <= self.outliers < 1:
            raise InvalidValueError(f"outliers must be in [0, 1), got {self.outliers!r}", code="method.outliers")
        if self.density + self.outliers > 1 + 1e-9:
            raise InvalidValueError(
                f"density and outliers must sum to 1 at most, got {self.density!r} and {self.outliers!r}",
                code="method.density",
            )

    def operators(self) -> Sequence[Operator]:
        """Return the chain."""
        trim = Trim(density=self.density, skip=self.outliers)
        if self.elect:
            return (trim, *consensus("scale-first", normalize=False, gain=self.gain))
        return trim, Weigh(), Total(), Gain(factor=self.gain)
