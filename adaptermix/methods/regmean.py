"""RegMean: the linear layer nearest in its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..algebra import LowRank, Stack, factored
from ..errors import InvalidValueError
from .base import MergeMethod, method


def _inverse(gram: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Return the inverse of a Gram matrix on the directions above rounding errors, and a basis of these.

    Scaled to a diagonal of ones first: features differ in size by orders of magnitude, and rounding is
    relative, so small features have the same accuracy as large ones.

    Args:
        gram: Gram matrix in float64.
        rounding: Machine epsilon of the dtype that it was stored in.

    Shapes: gram and the inverse are [in in]; the basis is [in seen], orthonormal.
    """
    scales = gram.diagonal().clamp(min=0).sqrt()
    scales = torch.where(scales > 0, scales, 1.0)
    scaled = gram / scales / scales[:, None]
    values, vectors = torch.linalg.eigh(scaled)
    # Independent errors of the entries add up to a matrix whose largest eigenvalue is about the longest row of errors.
    noise = rounding * float(torch.linalg.vector_norm(scaled, dim=1).max())
    exact = torch.finfo(torch.float64).eps * len(values) * float(values[-1])
    kept = vectors[:, values > max(noise, exact, 0.0)]
    inverse = (kept / values[len(values) - kept.shape[1] :]) @ kept.T / scales / scales[:, None]
    return inverse, torch.linalg.qr(kept * scales[:, None]).Q


@method("regmean")
@dataclass(frozen=True, slots=True, kw_only=True)
class RegMean(MergeMethod):
    r"""The delta whose outputs differ least, in squares, from each adapter's on that adapter's own inputs.

    $\Delta = (\sum_i w_i \tau_i G_i) (\sum_i w_i G_i)^{-1}$ with $G_i = X_i^T X_i$ from the inputs of the module, rows
    of $X_i$. On directions that no input has, the weighted mean: those are the ones that are not above the
    rounding of the statistics, by the dtype of their files. The result keeps the left factors, so it is low rank.

    Divide each G by its number of rows: else a text seven times as long weighs seven times as much. A delta that is
    zero counts in the mean, also where its file has no statistics of the module: then the others are merged, times
    their share of the weights.

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
            raise InvalidValueError(
                f"off_diagonal must be in [0, 1], got {self.off_diagonal!r}", code="method.off-diagonal"
            )

    def __call__(self, stack: Stack) -> LowRank:
        """Solve for the right factors.

        Raises:
            ValueError: weights that are negative or all zero.
        """
        if min(stack.weights) < 0 or sum(stack.weights) == 0:
            raise InvalidValueError(
                f"regmean needs weights of at least 0, not all 0, got {list(stack.weights)}",
                code="method.negative-weight",
            )
        shares = [weight / sum(stack.weights) for weight in stack.weights]
        grams = [share * self._shrunk(result) for share, result in zip(shares, stack.statistics, strict=True)]
        rounding = max(torch.finfo(result.dtype).eps for result in stack.statistics)
        inverse, seen = _inverse(torch.stack(grams).sum(0), rounding)
        left, right = [], []
        for update, share, gram in zip(stack.updates, shares, grams, strict=True):
            low = factored(update).to(torch.float64)
            left.append(low.b)
            inside = (low.a @ gram @ inverse - share * low.a) @ seen @ seen.T
            right.append(low.scale * self.gain * (inside + share * low.a))
        return LowRank(b=torch.cat(left, dim=1).to(stack.dtype), a=torch.cat(right).to(stack.dtype))

    def _shrunk(self, gram: Tensor) -> Tensor:
        gram = gram.double()
        return self.off_diagonal * gram + (1 - self.off_diagonal) * torch.diag(gram.diagonal())
