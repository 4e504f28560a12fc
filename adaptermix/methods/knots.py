"""KnOTS: align the deltas by one SVD, then merge the remaining factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..algebra import Dense, LowRank, Stack, core_of
from ..algebra.operators import Operator, Trim, chain
from .base import MergeMethod, method, require_share
from .ties import Order, consensus


@method("knots")
@dataclass(frozen=True, slots=True, kw_only=True)
class Knots(MergeMethod):
    r"""Merge the deltas by TIES in the basis of their joint SVD.

    $[\tau_1 \dots \tau_k] = U \Sigma [V_1 \dots V_k]^T$; the parts $\Sigma V_i^T$ are merged by TIES and multiplied by
    U. The joint basis has at most $\sum_i r_i$ columns, so the result is low rank and no [out in] matrix is formed.

    Args:
        density: Share of the entries of each $\Sigma V_i^T$ kept, in (0, 1].
        gain: $\lambda$, a factor on the result.
        order: As in `ties`.
        normalize: Divide by the survivors.

    Shapes: k updates [out in] give one [out in] of rank at most $\sum_i r_i$.
    Differs from the paper: every adapter has its own weight (the authors' code uses the first for all); singular values
    are dropped at the numerical rank in float64 instead of at 1e-5. Where singular values coincide, the basis, and so
    the trimming, is not unique.
    Exact when: there is one adapter and density is 1.
    Reference: Stoica et al., Model Merging with SVD to Tie the Knots, ICLR 2025, arXiv 2410.19735, section 4.
    """

    factor: ClassVar[str | None] = "gain"

    density: float = 0.2
    gain: float = 1.0
    order: Order = "elect-first"
    normalize: bool = True

    def __post_init__(self) -> None:
        require_share("density", self.density)
        self.operators()

    def operators(self) -> Sequence[Operator]:
        """Return the chain that merges the aligned parts."""
        return Trim(density=self.density), *consensus(self.order, normalize=self.normalize, gain=self.gain)

    def __call__(self, stack: Stack) -> LowRank:
        """Align the deltas, merge the aligned parts, and map the result back."""
        core = core_of(stack.updates)
        aligned = tuple(Dense(w=(part @ core.right.T).to(stack.dtype)) for part in core.parts)
        merged = chain(replace(stack, updates=aligned, statistics=()), self.operators())
        return LowRank(b=core.left.to(stack.dtype), a=merged.w)
