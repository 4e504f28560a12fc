"""RegMean: the linear layer nearest in its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..algebra import LowRank, Stack, factored
from .base import MergeMethod, method


@method("regmean")
@dataclass(frozen=True, slots=True, kw_only=True)
class RegMean(MergeMethod):
    r"""The delta whose outputs differ least, in squares, from each adapter's on that adapter's own inputs.

    $\Delta = (\sum_i w_i \tau_i G_i) (\sum_i w_i G_i)^{-1}$ with $G_i = X_i^T X_i$ from the inputs of the module, rows
    of $X_i$. On directions that no input has, the weighted mean. The result keeps the left factors, so it is low rank.

    Args:
        off_diagonal: Factor on the off-diagonal entries of G ($\alpha$ in the paper), in [0, 1].
        gain: A factor on the result.

    Shapes: k updates [out in] with statistics [in in] give one [out in] of rank at most $\sum_i r_i$.
    Differs from the paper: deltas instead of weights, which is the same for one base model; weights.
    Exact when: there is one adapter, or all G are equal (then the weighted mean; weights are divided by their sum).
    Reference: Jin et al., Dataless Knowledge Fusion, ICLR 2023, arXiv 2212.09849, section 3.
    """

    factor: ClassVar[str | None] = "gain"
    statistics: ClassVar[Literal["out in", "in in"] | None] = "in in"
    off_diagonal: float = 0.9
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.off_diagonal <= 1:
            raise ValueError(f"off_diagonal must be in [0, 1], got {self.off_diagonal!r}")

    def __call__(self, stack: Stack) -> LowRank:
        """Solve for the right factors.

        Raises:
            ValueError: weights that are negative or all zero.
        """
        if min(stack.weights) < 0 or sum(stack.weights) == 0:
            raise ValueError(f"regmean needs weights of at least 0, not all 0, got {list(stack.weights)}")
        shares = [weight / sum(stack.weights) for weight in stack.weights]
        grams = [share * self._shrunk(found) for share, found in zip(shares, stack.statistics, strict=True)]
        values, vectors = torch.linalg.eigh(torch.stack(grams).sum(0))
        seen = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        inverse = torch.where(seen, 1 / torch.where(seen, values, 1.0), 0.0)
        rest = (vectors * ~seen) @ vectors.T
        left, right = [], []
        for update, share, gram in zip(stack.updates, shares, grams, strict=True):
            low = factored(update).to(torch.float64)
            left.append(low.b)
            right.append(
                low.scale * self.gain * (((low.a @ gram) @ vectors * inverse) @ vectors.T + share * low.a @ rest)
            )
        return LowRank(b=torch.cat(left, dim=1).to(stack.dtype), a=torch.cat(right).to(stack.dtype))

    def _shrunk(self, gram: Tensor) -> Tensor:
        gram = gram.double()
        return self.off_diagonal * gram + (1 - self.off_diagonal) * torch.diag(gram.diagonal())
