"""PEFT's `linear`, cross terms and all, for comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..algebra import LowRank, Stack
from .base import MergeMethod, method
from .factor_sums import sum_factors


@method("peft-linear")
@dataclass(frozen=True, slots=True, kw_only=True)
class PeftLinear(MergeMethod):
    r"""The sum of the factors that PEFT calls `linear`; for reproducing results, not for use.

    $A = \sum_i e_i \sqrt{|w_i s_i|} A_i$, $B = \sum_i \sqrt{|w_i s_i|} B_i$ with $e_i = sgn(w_i s_i)$, so that
    $\Delta = \sum_i w_i \tau_i + \sum_{i \ne j} e_j \sqrt{|w_i s_i w_j s_j|} B_i A_j$. The cross terms belong to no
    adapter, and the result depends on how each delta happens to be split into factors: a delta that is zero by B alone
    has them too, unlike one of a module that the adapter lacks.

    Shapes: k updates [out in] of one rank r give one [out in] of rank r.
    Differs from PEFT: rsLoRA inputs are scaled right (PEFT 0.21 multiplies them by sqrt(r) again).
    Exact when: there is one adapter.
    Reference: peft 0.21, `add_weighted_adapter` with `combination_type="linear"`.
    """

    takes_factors: ClassVar[bool] = True

    def __call__(self, stack: Stack) -> LowRank:
        """Add the factors.

        Raises:
            ValueError: updates of other ranks, or dense ones.
        """

        def shares(weight: float, scale: float) -> tuple[float, float]:
            factor = weight * scale
            return math.sqrt(abs(factor)), math.copysign(math.sqrt(abs(factor)), factor)

        return sum_factors("peft-linear", stack, shares)
