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
SAMPLE = 2**14
"""Most entries that `sign_conflict` looks at."""
_ROUNDING = 8 * torch.finfo(torch.float64).eps
"""Share of the sum of sizes below which an inner product of factors is a rounding error of terms that cancel."""


def _dense_inner(x: Update, y: Update) -> float:
    """The same where one of the two is dense, over slices of rows, so that the matrix is never copied in full."""
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

    $s_x s_y \sum_{ij} (B_x^T B_y)_{ij} (A_x A_y^T)_{ij}$: two small products, never the dense matrices. Exactly 0 where
    the terms cancel up to rounding.

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
    total, size = _products(x, y, torch.float64)
    is_rounding = math.isfinite(size) and abs(total) <= _ROUNDING * size
    return 0.0 if is_rounding else x.scale * y.scale * total


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


def inner_products(updates: Sequence[Update]) -> Float[Tensor, "k k"]:
    """Return all inner products of the updates, in float64; exactly 0 where the terms cancel up to rounding."""
    low = [update for update in updates if isinstance(update, LowRank)]
    if len(low) == len(updates):
        return _all_products(low)
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for i, x in enumerate(updates):
        for j, y in enumerate(updates[: i + 1]):
            products[i, j] = products[j, i] = inner(x, y)
    return products


def _all_products(updates: Sequence[LowRank]) -> Float[Tensor, "k k"]:
    """Return all inner products from two products of the factors side by side, not two for every pair."""
    b = torch.cat([update.b.double() for update in updates], dim=1)
    a = torch.cat([update.a.double() for update in updates])
    products = ((b.T @ b) * (a @ a.T)).cpu()
    ranks = torch.tensor([update.rank for update in updates])
    owner = torch.nn.functional.one_hot(torch.arange(len(updates)).repeat_interleave(ranks), len(updates)).double()
    totals, sizes = owner.T @ products @ owner, owner.T @ products.abs() @ owner
    scales = torch.tensor([update.scale for update in updates], dtype=torch.float64)
    is_rounding = torch.isfinite(sizes) & (totals.abs() <= _ROUNDING * sizes)
    return torch.where(is_rounding, 0.0, totals * scales.outer(scales))


@lru_cache(maxsize=16)
def _sample(out: int, into: int) -> tuple[Tensor, Tensor]:
    """Return rows and columns of entries spread over a matrix: every entry of a small one, else SAMPLE drawn ones.

    Drawn, since an even grid sees one phase only of a pattern that repeats; each row and column gets an equal share.
    """
    if out * into <= SAMPLE:
        return torch.arange(out).repeat_interleave(into), torch.arange(into).repeat(out)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(SAMPLE, generator=generator)
    steps = torch.arange(SAMPLE), order
    result = [
        ((step + torch.rand(SAMPLE, generator=generator, dtype=torch.float64)) / SAMPLE * size)
        .long()
        .clamp(max=size - 1)
        for step, size in zip(steps, (out, into), strict=True)
    ]
    return result[0], result[1]


def _sampled(update: Update, rows: Tensor, columns: Tensor) -> Tensor:
    """Return entries of an update up to a positive factor: only their signs are used."""
    if isinstance(update, Dense):
        return update.w[rows.to(update.w.device), columns.to(update.w.device)].cpu()
    b, a = update.b.cpu(), update.a.cpu()
    # In float64, where products of float32 factors are exact: in float32, terms that cancel leave a rounding error,
    # whose sign would count. A small matrix whole: its product is cheaper than its entries one by one.
    if len(b) * a.shape[1] <= SAMPLE:
        values = (b.double() @ a.double())[rows, columns]
    else:
        values = (b[rows].double() * a.T[columns].double()).sum(1)
    return values * math.copysign(1.0, update.scale) if update.scale else torch.zeros_like(values)


def sign_conflict_by_chance(count: int) -> float:
    """Return the share of sign conflicts of independent updates whose signs are even: 1/2 of two, 3/4 of three.

    Args:
        count: Number of updates; fewer than two count as two.
    """
    return 1 - 0.5 ** (max(count, 2) - 1)


def sign_conflict(updates: Sequence[Update], weights: Sequence[float] | None = None) -> float:
    """Return the share of entries at which two of the updates, times their weights, pull in opposite directions.

    From at most 16,384 entries drawn over the matrix, so that no dense matrix is needed; exact for smaller modules.
    Entries where fewer than two updates are non-zero count as agreeing.

    Args:
        updates: The updates.
        weights: One per update, only its sign counts; default 1 each.

    Raises:
        ValueError: there is no update.
    """
    if not updates:
        raise ValueError("at least one update is needed")
    rows, columns = _sample(*updates[0].shape)
    up = torch.zeros(len(rows), dtype=torch.bool)
    down = torch.zeros_like(up)
    for update, weight in zip(updates, weights or [1.0] * len(updates), strict=True):
        values = _sampled(update, rows, columns)
        positive, negative = values > 0, values < 0
        if weight != 0:
            up |= positive if weight > 0 else negative
            down |= negative if weight > 0 else positive
    return int((up & down).sum()) / up.numel()
