"""Lengths, angles and disagreement of updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .updates import LowRank

SAMPLE = 256
"""Rows and columns at most that `sign_conflict` looks at."""


def inner(x: LowRank, y: LowRank) -> float:
    r"""Return the Frobenius inner product $\langle \Delta_x, \Delta_y \rangle$ from the factors, in float64.

    $s_x s_y \sum_{ij} (B_x^T B_y)_{ij} (A_x A_y^T)_{ij}$: two small products, never the dense matrices.

    Raises:
        ValueError: the updates differ in shape.
    """
    if x.shape != y.shape:
        raise ValueError(f"updates of one shape are needed, got {x.shape} and {y.shape}")
    left = x.b.double().T @ y.b.double()
    right = x.a.double() @ y.a.double().T
    return x.scale * y.scale * float((left * right).sum())


def norm(update: LowRank) -> float:
    """Return the Frobenius norm of the update."""
    return math.sqrt(max(inner(update, update), 0.0))


def cosine(x: LowRank, y: LowRank) -> float:
    """Return the cosine of the angle between two updates, 0 when one of them is zero."""
    length = norm(x) * norm(y)
    return inner(x, y) / length if length > 0 else 0.0


def _spread(size: int) -> torch.Tensor:
    """Indices of at most SAMPLE evenly spaced places."""
    return torch.linspace(0, size - 1, min(size, SAMPLE)).round().long()


def sign_conflict(updates: Sequence[LowRank]) -> float:
    """Return the share of entries at which two of the updates pull in opposite directions.

    Looked at on an even grid of at most 256 x 256 entries, so that no dense matrix is needed; exact for smaller
    modules. Entries where fewer than two updates are non-zero count as agreeing.

    Raises:
        ValueError: no update is given.
    """
    if not updates:
        raise ValueError("at least one update is needed")
    out, into = updates[0].shape
    rows, columns = _spread(out), _spread(into)
    # Signs only, so the size of the scale does not matter, but its sign does.
    signs = torch.stack(
        [
            torch.sign(math.copysign(1.0, u.scale) * (u.b[rows].float() @ u.a[:, columns].float())) * (u.scale != 0)
            for u in updates
        ]
    )
    return float(((signs.amax(0) > 0) & (signs.amin(0) < 0)).double().mean())
