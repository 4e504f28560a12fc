"""An average of adapter files, cross terms and all, for comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..algebra import LowRank, Stack
from .base import MergeMethod, method
from .factor_sums import sum_factors


@method("factor-average")
@dataclass(frozen=True, slots=True, kw_only=True)
class FactorAverage(MergeMethod):
    r"""Average A and B separately, as averaging adapter files does. For reproducing published numbers only.

    $\Delta = (\sum_i w_i \sqrt{|s_i|} B_i) (\sum_i w_i e_i \sqrt{|s_i|} A_i)$ with $e_i = sgn(s_i)$: each adapter acts
    by $w_i^2$, and the cross terms $w_i w_j B_i A_j$ belong to none. With one scale s this is s times the product of
    the averaged factors.

    Shapes: k updates [out in] of one rank r give one [out in] of rank r.
    Exact when: there is one adapter, of weight 1.
    Reference: one reading of "weighted average" in Liu and Niehues, ACL 2025, arXiv 2502.14830, section 5; `exact` is
    another.
    """

    takes_factors: ClassVar[bool] = True

    def __call__(self, stack: Stack) -> LowRank:
        """Average the factors.

        Raises:
            ValueError: updates of other ranks, or dense ones.
        """

        def shares(weight: float, scale: float) -> tuple[float, float]:
            root = math.sqrt(abs(scale))
            return weight * root, weight * math.copysign(root, scale)

        return sum_factors("factor-average", stack, shares)
