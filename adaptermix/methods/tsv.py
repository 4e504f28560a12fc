"""TSV-Merge: task singular vectors made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algebra import LowRank, Stack, Update, factored
from ..algebra.subspaces import EPSILON, Frame, frame
from .base import MergeMethod, method, require_floor, require_share
from .space import Space, core_shape, has_core


def _polar(columns: Tensor, floor: float) -> Tensor:
    """Return the orthonormal columns nearest to some, on the directions that they span; shorter ones are left out."""
    u, sigma, vh = torch.linalg.svd(columns, full_matrices=False)
    spans = sigma > max(floor, max(columns.shape) * EPSILON) * sigma[:1]
    nearest: Tensor = (u * spans) @ vh
    return nearest


@method("tsv")
@dataclass(frozen=True, slots=True, kw_only=True)
class Tsv(MergeMethod):
    r"""Put the leading singular vectors of all deltas side by side, make them orthogonal, and multiply back.

    With $\tau_i = U_i \Sigma_i V_i^T$ cut to its leading triplets, $U = [U_1 \dots U_k]$, V likewise and
    $\Sigma = diag(w_i \Sigma_i)$: $\Delta = \lambda \, polar(U) \Sigma \, polar(V)^T$, polar(X) being the orthonormal
    matrix nearest to X. Interference between adapters that use the same directions goes. From the factors: no dense
    matrix. Vectors, and matrices of one row or column, are added up: they have no directions to share.

    Args:
        share: Share of each delta's singular triplets that is kept, rounded up; None keeps min(out, in)/k of them, as
            the paper does, which cuts no LoRA whose rank times k is at most min(out, in). Truncation counts as
            residual.
        space: In which space min(out, in) counts: that of the matrices, or "core", where it is the smaller side of the
            matrices $M_i$ (`space` in `ties`), so LoRAs of equal rank are not cut, and LoRAs of
            higher rank are cut to it. Otherwise both give the same, since singular vectors do not depend on the basis.
        gain: $\lambda$, a factor on the result.
        floor: Directions of U or V that are shorter than this share of the longest are left out: 0.01 removes
            rounding errors between an adapter and a 16-bit copy of it.

    Shapes: k updates [out in] give one [out in] of rank at most $\sum_i r_i$.
    Differs from the paper: weights; deltas that are zero do not count in k; `share` is of the numerical rank of a
    delta. Vectors that depend on each other are made orthogonal within their span. One matrix at a time.
    Exact when: there is one adapter, or the adapters' subspaces are orthogonal without truncation.
    Reference: Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081, section 3.3.
    """

    factor: ClassVar[str | None] = "gain"

    share: float | None = None
    space: Space = "full"
    gain: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.share is not None:
            require_share("share", self.share)
        require_floor(self.floor)

    def __call__(self, stack: Stack) -> Update:
        """Cut, orthogonalise, multiply."""
        return self.measured(stack)[0]

    def measured(self, stack: Stack) -> tuple[Update, float]:
        """Return the merge, and the share of the weighted deltas' norm in the triplets that are cut."""
        if 1 in stack.shape:
            return stack.combined([weight * self.gain for weight in stack.weights]), 0.0
        frames = [frame(factored(update)) for update in stack.updates]
        counts = self._counts(frames, min(core_shape(stack) if has_core(self.space, stack) else stack.shape))
        if not sum(counts):
            zeros = torch.zeros(sum(stack.shape), 1, dtype=stack.dtype, device=stack.device)
            return LowRank(b=zeros[: stack.shape[0]], a=zeros[stack.shape[0] :].T.contiguous()), 0.0
        kept = list(zip(frames, counts, stack.weights, strict=True))
        sigma = torch.cat([weight * result.sigma[:count] for result, count, weight in kept])
        u = _polar(torch.cat([result.left[:, :count] for result, count, _ in kept], dim=1), self.floor)
        v = _polar(torch.cat([result.right[:, :count] for result, count, _ in kept], dim=1), self.floor)
        merged = LowRank(b=(u * sigma * self.gain).to(stack.dtype), a=v.T.contiguous().to(stack.dtype))
        whole = math.hypot(*(weight * result.norm for result, _, weight in kept))
        lost = math.hypot(*(weight * math.hypot(*result.sigma[count:].tolist()) for result, count, weight in kept))
        return merged, lost / whole if whole > 0 else 0.0

    def _counts(self, frames: Sequence[Frame], side: int) -> list[int]:
        """Return how many triplets of each delta are kept, for matrices with this smaller side."""
        acting = sum(result.rank > 0 for result in frames)
        if self.share is None:
            most = max(1, side // max(1, acting))
            return [min(most, result.rank) for result in frames]
        # a hair below, since 1/3 * 3 may exceed 1 by rounding
        return [math.ceil(self.share * result.rank - 1e-9) for result in frames]
