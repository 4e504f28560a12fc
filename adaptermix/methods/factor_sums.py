"""What methods share that add factors instead of deltas."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..algebra import LowRank, Stack
from ..errors import InvalidValueError


def sum_factors(name: str, stack: Stack, shares: Callable[[float, float], tuple[float, float]]) -> LowRank:
    """Return the product of the sums of B and of A.

    Args:
        name: The method's name.
        stack: The updates.
        shares: From an update's weight and scale to the factors of its B and its A.

    Raises:
        ValueError: updates of other ranks, or dense ones.
    """
    low = [update for update in stack.updates if isinstance(update, LowRank)]
    ranks = {update.rank for update in low}
    if len(low) < len(stack.updates) or len(ranks) != 1:
        raise InvalidValueError(
            f"{name} adds factors and needs one rank, got {sorted(ranks) or 'dense updates'}", code="method.one-rank"
        )
    b = torch.zeros(stack.shape[0], low[0].rank, dtype=stack.dtype, device=stack.device)
    a = torch.zeros(low[0].rank, stack.shape[1], dtype=stack.dtype, device=stack.device)
    for update, weight in zip(low, stack.weights, strict=True):
        of_b, of_a = shares(weight, update.scale)
        b += of_b * update.b.to(stack.dtype)
        a += of_a * update.a.to(stack.dtype)
    return LowRank(b=b, a=a)
