"""Lengths, angles and disagreement of updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from .updates import Dense, LowRank, Update

_ROWS = 256
SAMPLE = 128
"""Rows and columns at most that `sign_conflict` looks at."""


def _dense_inner(x: Update, y: Update) -> float:
    """The same where one of the two is dense, over slices of rows, so that nothing is copied whole."""
    total = 0.0
    for first in range(0, x.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        parts = [
            u.w[rows].double() if isinstance(u, Dense) else u.scale * (u.b[rows].double() @ u.a.double())
            for u in (x, y)
        ]
        total += float((parts[0] * parts[1]).sum())
    return total


def inner(x: Update, y: Update) -> float:
    r"""Return the Frobenius inner product $\langle \Delta_x, \Delta_y \rangle$ from the factors, in float64.

    $s_x s_y \sum_{ij} (B_x^T B_y)_{ij} (A_x A_y^T)_{ij}$: two small products, never the dense matrices.

    Raises:
        ValueError: the updates differ in shape.
    """
    if x.shape != y.shape:
        raise ValueError(f"updates of one shape are needed, got {x.shape} and {y.shape}")
    if isinstance(x, Dense) or isinstance(y, Dense):
        return _dense_inner(x, y)
    factors = (x.b, y.b, x.a, y.a)
    if all(factor.dtype != torch.float64 for factor in factors):
        total, size = _products(x, y, torch.float32)
        # In float32 unless terms cancel: then its rounding would show.
        if math.isfinite(size) and abs(total) > 0.1 * size:
            return x.scale * y.scale * total
    return x.scale * y.scale * _products(x, y, torch.float64)[0]


def _products(x: LowRank, y: LowRank, dtype: torch.dtype) -> tuple[float, float]:
    """Return the sum over the products of the two Gram matrices, and that of their sizes."""
    left = (x.b.to(dtype).T @ y.b.to(dtype)).double()
    right = (x.a.to(dtype) @ y.a.to(dtype).T).double()
    products = left * right
    return float(products.sum()), float(products.abs().sum())


def norm(update: Update) -> float:
    """Return the Frobenius norm of the update."""
    return math.sqrt(max(inner(update, update), 0.0))


def cosine(x: Update, y: Update) -> float:
    """Return the cosine of the angle between two updates, 0 when one of them is zero."""
    length = norm(x) * norm(y)
    return inner(x, y) / length if length > 0 else 0.0


@lru_cache(maxsize=64)
def _spread(size: int) -> torch.Tensor:
    """Indices of at most SAMPLE evenly spaced places."""
    return torch.linspace(0, size - 1, min(size, SAMPLE)).round().long()


def inner_products(updates: Sequence[Update]) -> Float[Tensor, "k k"]:
    """Return all inner products of the updates, in float64."""
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for i, x in enumerate(updates):
        for j, y in enumerate(updates[: i + 1]):
            products[i, j] = products[j, i] = inner(x, y)
    return products


def _sampled(update: Update, rows: Tensor, columns: Tensor) -> Tensor:
    """Return entries of an update up to a positive factor: only their signs are wanted."""
    if isinstance(update, Dense):
        return update.w[rows][:, columns]
    if update.scale == 0:
        return torch.zeros(len(rows), len(columns))
    sign = math.copysign(1.0, update.scale)
    values: Tensor = (sign * update.b[rows].float()) @ update.a[:, columns].float()
    return values


def sign_conflict_by_chance(count: int) -> float:
    """Return the share of sign conflicts of independent updates whose signs are even: 1/2 of two, 3/4 of three.

    Args:
        count: Number of updates; of fewer than two that of two is returned.
    """
    return 1 - 0.5 ** (max(count, 2) - 1)


def sign_conflict(updates: Sequence[Update]) -> float:
    """Return the share of entries at which two of the updates pull in opposite directions.

    Looked at on an even grid of at most 128 x 128 entries, so that no dense matrix is needed; exact for smaller
    modules. Entries where fewer than two updates are non-zero count as agreeing.

    Raises:
        ValueError: no update is given.
    """
    if not updates:
        raise ValueError("at least one update is needed")
    out, into = updates[0].shape
    rows, columns = _spread(out), _spread(into)
    up = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    down = torch.zeros_like(up)
    for update in updates:
        values = _sampled(update, rows, columns)
        up |= values > 0
        down |= values < 0
    return int((up & down).sum()) / up.numel()
