"""Core space of several updates: their small matrices in a common basis of outputs and a common basis of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .lowrank import factored
from .subspaces import numerical_rank
from .updates import LowRank, Update


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Core:
    r"""Updates in common orthonormal bases: $\tau_i = U M_i V^T$ for every i, with nothing lost.

    The bases are the singular vectors of the updates side by side, $[\tau_1 \dots \tau_k]$ for U, and on top of each
    other for V, so they depend on the updates alone and not on how these are split into factors. The sign of each
    vector makes its largest entry positive.

    Args:
        left: U, a basis of all outputs that an update writes to.
        right: V, a basis of all inputs that an update reads.
        parts: $M_i$, one per update.

    Shapes: left is [out p], right [in q], each part [p q]; p and q are at most the sum of the ranks and at least 1.
        float64.
    """

    left: Float[Tensor, "out p"]
    right: Float[Tensor, "in q"]
    parts: tuple[Float[Tensor, "p q"], ...]

    def update(self, merged: Float[Tensor, "p q"], dtype: torch.dtype) -> LowRank:
        """Return a matrix of the core as an update of the module; its rank is the smaller of p and q."""
        merged = merged.double()
        if merged.shape[0] <= merged.shape[1]:
            return LowRank(b=self.left.to(dtype), a=(merged @ self.right.T).to(dtype))
        return LowRank(b=(self.left @ merged).to(dtype), a=self.right.T.contiguous().to(dtype))


def core_of(updates: Sequence[Update]) -> Core:
    """Return the core of updates of one module, from the QRs of their factors; no [out in] matrix is formed.

    A dense update enters by its exact thin SVD.
    """
    low = [factored(update) for update in updates]
    shape = low[0].shape
    ranks = [update.rank for update in low]
    q_b, r_b = torch.linalg.qr(torch.cat([update.b.double() * update.scale for update in low], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([update.a.double() for update in low]).T)
    parts = [b @ a.T for b, a in zip(r_b.split(ranks, dim=1), r_a.split(ranks, dim=1), strict=True)]
    left = _basis(q_b, torch.cat(parts, dim=1), shape)
    right = _basis(q_a, torch.cat(parts).T, shape)
    # Both are products with orthonormal columns: small matrices instead of [out in] ones.
    turn_b, turn_a = left.T @ q_b, q_a.T @ right
    return Core(left=left, right=right, parts=tuple(turn_b @ part @ turn_a for part in parts))


def _basis(frame: Float[Tensor, "n r"], parts: Float[Tensor, "r m"], shape: tuple[int, int]) -> Float[Tensor, "n p"]:
    """Return the left singular vectors of `frame @ parts` at its numerical rank, at least one."""
    u, sigma, _ = torch.linalg.svd(parts, full_matrices=False)
    basis = frame @ u[:, : max(1, numerical_rank(sigma, shape))]
    # The sign of a singular vector is arbitrary, and an election of signs depends on it where entries cancel.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    signed: Tensor = basis * torch.where(largest < 0, -1.0, 1.0)
    return signed
