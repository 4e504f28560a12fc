"""Slow float64 arithmetic, written from the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptermix.algebra import LowRank


def dense(update: LowRank) -> Tensor:
    """scale * B A, entry by entry."""
    b, a = update.b.double().tolist(), update.a.double().tolist()
    rows, columns, rank = len(b), len(a[0]), len(a)
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            matrix[i, j] = update.scale * sum(b[i][r] * a[r][j] for r in range(rank))
    return matrix


def total(updates: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """Sum of w s B A."""
    matrix = torch.zeros(updates[0].shape, dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        matrix += weight * dense(update)
    return matrix


def size(updates: Sequence[LowRank], weights: Sequence[float]) -> float:
    """Sum of |w s| |B| |A|: what rounding errors are relative to, also where the terms cancel."""
    return sum(
        abs(weight * update.scale) * float(update.b.double().norm() * update.a.double().norm())
        for update, weight in zip(updates, weights, strict=True)
    )


def conflict(updates: Sequence[LowRank]) -> float:
    """Share of entries with both a positive and a negative value, entry by entry."""
    matrices = [dense(update) for update in updates]
    rows, columns = matrices[0].shape
    count = 0
    for i in range(rows):
        for j in range(columns):
            values = [float(matrix[i, j]) for matrix in matrices]
            count += any(value > 0 for value in values) and any(value < 0 for value in values)
    return count / (rows * columns)


def snapshot(updates: Sequence[LowRank]) -> list[tuple[int, Tensor]]:
    """Version counter and copy of every factor, to compare afterwards with `assert_untouched`."""
    return [(tensor._version, tensor.clone()) for update in updates for tensor in (update.b, update.a)]


def assert_untouched(updates: Sequence[LowRank], before: list[tuple[int, Tensor]]) -> None:
    """Fail if a factor was written to since the snapshot."""
    after = [tensor for update in updates for tensor in (update.b, update.a)]
    for tensor, (version, copy) in zip(after, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy)
