"""Iso-C: the weighted sum with a flat spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..algebra import LowRank, Stack, factored
from ..algebra.subspaces import frame
from .base import MergeMethod, method, require_floor
from .space import Space, core_shape, has_core


@method("iso-c")
@dataclass(frozen=True, slots=True, kw_only=True)
class IsoC(MergeMethod):
    r"""Weighted sum of the deltas with all its singular values set to their mean.

    $\sum_i w_i \tau_i = U \Sigma V^T$, $\Delta = \lambda \bar\sigma U V^T$, where the mean is over the numerical rank
    R.

    Args:
        gain: $\lambda$, a factor on the result.
        floor: Singular values below this share of the largest are left out: 0.01 removes rounding errors between
            an adapter and a 16-bit copy of it, which would count as much as every other direction.
        space: "full" means over the numerical rank of the sum. "core" means over the smaller side of the matrices
            $M_i$ (`space` in `ties`): the same unless deltas cancel, where the directions that cancel count as zeros.

    Shapes: k updates [out in] give one [out in] of the rank of their sum.
    Differs from the paper: the paper means over all min(out, in) singular values. A sum of LoRAs has at most
    $\sum_i r_i$ that are not zero, so that mean is tiny and the result has full rank, made of directions that no
    adapter ever used; here the mean is over the numerical rank. A single adapter does not stay unchanged: its
    spectrum is flattened, as the paper's would be.
    Exact when: all singular values of the sum are equal.
    Reference: Marczak et al., No Task Left Behind, ICML 2025, arXiv 2502.04959, section 4.
    """

    factor: ClassVar[str | None] = "gain"

    gain: float = 1.0
    floor: float = 0.0
    space: Space = "full"

    def __post_init__(self) -> None:
        require_floor(self.floor)

    def __call__(self, stack: Stack) -> LowRank:
        """Flatten the spectrum of the sum."""
        result = frame(factored(stack.combined(stack.weights)))
        kept = int((result.sigma > self.floor * result.sigma[:1]).sum())
        if not kept:
            zeros = torch.zeros(sum(stack.shape), 1, dtype=stack.dtype, device=stack.device)
            return LowRank(b=zeros[: stack.shape[0]], a=zeros[stack.shape[0] :].T.contiguous())
        left, right = result.left[:, :kept], result.right[:, :kept]
        count = max(kept, min(core_shape(stack))) if has_core(self.space, stack) else kept
        mean = float(result.sigma[:kept].sum()) / count * self.gain
        return LowRank(b=(left * mean).to(stack.dtype), a=right.T.contiguous().to(stack.dtype))
