"""TSV-Merge: task singular vectors made orthogonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algebra import LowRank, Stack, factored
from ..algebra.subspaces import EPSILON, frame
from .base import MergeMethod, method, require_share


def _polar(columns: Tensor) -> Tensor:
    """Return the orthonormal columns nearest to the given ones, on the directions that they span."""
    u, sigma, vh = torch.linalg.svd(columns, full_matrices=False)
    spans = sigma > max(columns.shape) * EPSILON * sigma[:1]
    nearest: Tensor = (u * spans) @ vh
    return nearest


@method("tsv")
@dataclass(frozen=True, slots=True, kw_only=True)
class Tsv(MergeMethod):
    r"""Put the leading singular vectors of all deltas side by side, make them orthogonal, and multiply back.

    With $\tau_i = U_i \Sigma_i V_i^T$ cut to its leading triplets, $U = [U_1 \dots U_k]$, V likewise and
    $\Sigma = diag(w_i \Sigma_i)$: $\Delta = \lambda \, polar(U) \Sigma \, polar(V)^T$, polar(X) being the orthonormal
    matrix nearest to X. Interference between adapters that use the same directions goes. From the factors: no dense
    matrix.

    Args:
        share: Share of each delta's singular triplets that is kept, rounded up; None is 1/k, as in the paper.
        gain: $\lambda$, a factor on the result.

    Shapes: k updates [out in] give one [out in] of rank at most $\sum_i r_i$.
    Differs from the paper: the share is of the numerical rank of a delta, not of min(out, in), of which a LoRA uses
    little. Vectors that depend on each other are made orthogonal within their span. One matrix at a time, biases apart.
    Exact when: there is one adapter, or the adapters' subspaces are orthogonal and share is 1.
    Reference: Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081, section 3.3.
    """

    factor: ClassVar[str | None] = "gain"

    share: float | None = None
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.share is not None:
            require_share("share", self.share)

    def __call__(self, stack: Stack) -> LowRank:
        """Cut, orthogonalise, multiply."""
        share = 1 / len(stack.updates) if self.share is None else self.share
        left, sigma, right = [], [], []
        for update, weight in zip(stack.updates, stack.weights, strict=True):
            found = frame(factored(update))
            # a hair below, since 1/3 * 3 may exceed 1 by rounding
            kept = math.ceil(share * found.rank - 1e-9)
            left.append(found.left[:, :kept])
            sigma.append(weight * found.sigma[:kept])
            right.append(found.right[:, :kept])
        if not sum(len(values) for values in sigma):
            return LowRank(
                b=torch.zeros(stack.shape[0], 1, dtype=stack.dtype, device=stack.device),
                a=torch.zeros(1, stack.shape[1], dtype=stack.dtype, device=stack.device),
            )
        u, v = _polar(torch.cat(left, dim=1)), _polar(torch.cat(right, dim=1))
        return LowRank(b=(u * torch.cat(sigma) * self.gain).to(stack.dtype), a=v.T.contiguous().to(stack.dtype))
