"""DO-Merging: lengths and directions of the deltas, merged apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..algebra import Dense, LowRank, Stack, Update, norm
from ..errors import InvalidValueError
from .base import MergeMethod, method

_ROUNDING = 8 * torch.finfo(torch.float64).eps


@method("do-merging")
@dataclass(frozen=True, slots=True, kw_only=True)
class DoMerging(MergeMethod):
    r"""Bring all deltas to one length, column by column, before they are added: a long one does not drown a short one.

    With $m_i$ the lengths of the columns of $\tau_i$ and $\bar m = \sum_i |w_i| m_i / \sum_i |w_i|$:

        $\Delta = \lambda \sum_i w_i \tau_i \, diag(\bar m / m_i)$,

    the weighted sum of the directions times the mean of the lengths. It scales the columns of the right factors, so the
    result stays low rank without truncation. A column that is zero has no direction and does not count in the mean.

    Args:
        per: "column" balances each input's column, as the paper does. "module" balances whole deltas: it leaves each
            delta as it is but for a factor, so that columns that an adapter hardly uses are not enlarged.
        gain: $\lambda$, a factor on the result.

    Shapes: k updates [out in] give one [out in] of rank at most $\sum_i r_i$.
    Differs from the paper: weights (1/k each there); without its second step, a gradient descent that makes the factors
    of different adapters orthogonal, since its result depends on how a delta is split into factors. RobustMerge (arXiv
    2502.17159) balances as well, but by pruning and scaling A and B and adding each of them up, which needs one rank
    and multiplies the factors of different adapters with each other.
    Exact when: there is one adapter, or all have the same lengths.
    Reference: Zheng et al., Decouple and Orthogonalize: A Data-Free Framework for LoRA Merging, 2025, arXiv 2505.15875.
    """

    factor: ClassVar[str | None] = "gain"

    per: Literal["column", "module"] = "column"
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.per not in ("column", "module"):
            raise InvalidValueError(f"per must be column or module, got {self.per!r}", code="method.per")

    def __call__(self, stack: Stack) -> Update:
        """Balance, and add up."""
        lengths = torch.stack([self._lengths(update) for update in stack.updates])
        weights = torch.tensor(stack.weights, dtype=torch.float64, device=stack.device).abs()[:, None]
        counted = (weights * (lengths > 0)).sum(0)
        mean = (weights * lengths).sum(0) / torch.where(counted > 0, counted, 1.0)
        ratios = torch.where(lengths > 0, mean / torch.where(lengths > 0, lengths, 1.0), 0.0)
        updates = [_scaled(update, ratio) for update, ratio in zip(stack.updates, ratios, strict=True)]
        merged = Stack.of(updates).combined([weight * self.gain for weight in stack.weights])
        return merged.to(stack.dtype)

    def _lengths(self, update: Update) -> Tensor:
        """Return the length of each column, or of the whole; 0 for rounding errors of terms that cancel."""
        if self.per == "module":
            return torch.tensor([norm(update)], dtype=torch.float64, device=_device(update))
        if isinstance(update, Dense):
            columns: Tensor = torch.linalg.vector_norm(update.w.double(), dim=0)
            return columns
        r, a = torch.linalg.qr(update.b.double()).R, update.a.double()
        result = torch.linalg.vector_norm(r @ a, dim=0)
        terms = torch.linalg.vector_norm(r, dim=0) @ a.abs()
        lengths: Tensor = torch.where(result > _ROUNDING * terms, result, 0.0) * abs(update.scale)
        return lengths


def _device(update: Update) -> torch.device:
    return update.w.device if isinstance(update, Dense) else update.a.device


def _scaled(update: Update, ratio: Tensor) -> Update:
    """Return an update with its columns multiplied, in float64."""
    if isinstance(update, Dense):
        return Dense(w=update.w.double() * ratio)
    return LowRank(b=update.b.double(), a=update.a.double() * ratio, scale=update.scale)
