"""PEFT's `linear`, cross terms and all, for comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..algebra import LowRank, Stack
from .base import MergeMethod, method


@method("peft-linear")
@dataclass(frozen=True, slots=True, kw_only=True)
class PeftLinear(MergeMethod):
    r"""The sum of the factors that PEFT calls `linear`; for reproducing results, not for use.

    $A = \sum_i e_i \sqrt{|w_i s_i|} A_i$, $B = \sum_i \sqrt{|w_i s_i|} B_i$ with $e_i = sgn(w_i s_i)$, so that
    $\Delta = \sum_i w_i \tau_i + \sum_{i \ne j} e_j \sqrt{|w_i s_i w_j s_j|} B_i A_j$. The cross terms belong to no
    adapter, and the result depends on how each delta happens to be split into factors.

    Shapes: k updates [out in] of one rank r give one [out in] of rank r.
    Differs from PEFT: rsLoRA inputs are scaled right (PEFT 0.21 multiplies them by sqrt(r) again).
    Exact when: there is one adapter.
    Reference: peft 0.21, `add_weighted_adapter` with `combination_type="linear"`.
    """

    def __call__(self, stack: Stack) -> LowRank:
        """Add the factors.

        Raises:
            ValueError: updates of other ranks, or dense ones.
        """
        low = [update for update in stack.updates if isinstance(update, LowRank)]
        ranks = {update.rank for update in low}
        if len(low) < len(stack.updates) or len(ranks) != 1:
            raise ValueError(f"peft-linear adds factors and needs one rank, got {sorted(ranks) or 'dense updates'}")
        b = torch.zeros(stack.shape[0], low[0].rank, dtype=stack.dtype, device=stack.device)
        a = torch.zeros(low[0].rank, stack.shape[1], dtype=stack.dtype, device=stack.device)
        for update, weight in zip(low, stack.weights, strict=True):
            factor = weight * update.scale
            root = math.sqrt(abs(factor))
            b += root * update.b.to(stack.dtype)
            a += math.copysign(root, factor) * update.a.to(stack.dtype)
        return LowRank(b=b, a=a)
