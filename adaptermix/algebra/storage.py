"""Factors in their storage dtype, rounded so that their product loses little, with the loss measured."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from .geometry import norm
from .lowrank import balanced, decompose, working_dtype
from .updates import LowRank, all_finite

_CANCELLED = 100.0
"""If the rank-one terms are this many times as long as their sum, the sum has lost two digits."""


def scaled(a: Float[Tensor, "r in"], scale: float) -> Float[Tensor, "r in"]:
    """Return a factor times a scale, in float32 or wider."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    return wide if scale == 1 else scale * wide


def cancels(update: LowRank, length: float) -> bool:
    r"""Return whether rounding the factors to float32 changes the product by more than about 1e-5 of its norm.

    Rounding $b_i a_i^T$ costs about $\epsilon \|b_i\| \|a_i\|$ per rank.

    Args:
        update: The update.
        length: Its Frobenius norm.
    """
    terms = torch.linalg.vector_norm(update.b, dim=0) * torch.linalg.vector_norm(update.a, dim=1)
    return abs(update.scale) * float(torch.linalg.vector_norm(terms)) > _CANCELLED * length


def to_storage(update: LowRank, dtype: torch.dtype) -> tuple[LowRank, float]:
    r"""Return an update with factors in a storage dtype, and the Frobenius norm of the rounding error.

    The factors are rounded directly if the error is at most that of rounding the product itself. Long factors with a
    short product (a difference of two adapters, PiSSA minus its initial factors) would lose far more: these are first
    replaced by $U \sqrt{\Sigma}$ and $\sqrt{\Sigma} V^T$ of the float64 SVD.

    Args:
        update: The update, in float32 or float64.
        dtype: The storage dtype, of 16 bits, or `torch.float32` for an update in float64.

    Shapes: input and result are [out in] of rank r; the scale of the result is 1.

    Returns:
        The update and the norm; the norm is infinite, and the factors are not finite, where they overflow the dtype.
    """
    even = _even(update)
    direct = even.to(dtype)
    lost = _distance(even, direct)
    if lost <= 0.5 * torch.finfo(dtype).eps * norm(even) or not _is_finite(even):
        return direct, lost
    u, sigma, vh = decompose(even)
    best = balanced(u, sigma, vh, rank=len(sigma), dtype=torch.float64)
    refactored = best.to(dtype)
    less = _distance(best, refactored)
    if not less < lost:
        return direct, lost
    missing = update.rank - len(sigma)  # ranks beyond the sides of the matrix
    return LowRank(b=pad(refactored.b, (0, missing)), a=pad(refactored.a, (0, 0, 0, missing))), less


def _even(update: LowRank) -> LowRank:
    """Give both factors equal lengths per rank, so that neither leaves the range of half precision before the other."""
    dtype = working_dtype([update])
    a, b = scaled(update.a, update.scale).to(dtype), update.b.to(dtype)
    right = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    left = torch.linalg.vector_norm(b, dim=0, dtype=torch.float64)
    there = (left > 0) & (right > 0)
    exponent = torch.where(there, 0.5 * (right.log2() - left.log2()), 0.0)
    share = torch.exp2(exponent.round()).to(dtype)  # powers of two, so that no rounding happens here
    return LowRank(b=b * share, a=a / share[:, None])


def _is_finite(update: LowRank) -> bool:
    return all_finite(update.a) and all_finite(update.b)


def _distance(exact: LowRank, stored: LowRank) -> float:
    r"""Return $\|B A - B' A'\|$ as $\|(B - B') A' + B (A - A')\|$, so that no digits cancel."""
    if not _is_finite(stored):
        return math.inf
    b, a = stored.b.to(exact.b.dtype), stored.a.to(exact.a.dtype)
    left, right = torch.cat([exact.b - b, exact.b], dim=1), torch.cat([a, exact.a - a])
    return norm(LowRank(b=left, a=right))


class Zeros(NamedTuple):
    """Where the factors of a module are zero.

    Args:
        zero: Whether one of them is zero everywhere.
        rank: Number of the last rank with a row of A or a column of B that is not zero, at least 1.
    """

    zero: bool
    rank: int


def zeros_of(a: Float[Tensor, "r in"], b: Float[Tensor, "out r"]) -> Zeros:
    """Return where the factors of a module are zero; reads only a part of factors that are not zero."""
    # For factors that are not zero, the first and the last rank are enough to see it.
    zero = any(not bool(part[:1].any()) and not bool(part.any()) for part in (a, b.T))
    rank = a.shape[0]
    while rank > 1 and not bool(a[rank - 1].any()) and not bool(b[:, rank - 1].any()):
        rank -= 1
    return Zeros(zero, rank)
