"""WUDI: the delta that interferes least with each adapter on the adapter's own directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algebra import Stack, Update, core_of
from ..algebra.subspaces import numerical_rank
from ..errors import InvalidValueError
from .base import MergeMethod, method


@method("wudi")
@dataclass(frozen=True, slots=True, kw_only=True)
class Wudi(MergeMethod):
    r"""Have the effect of each adapter on the inputs that it reads, without any data.

    The rows of a delta span the inputs that its training saw, so the delta itself represents them. The result
    minimises

        $\sum_i \|(\Delta - w_i \tau_i) \tau_i^T\|_F^2 / \|\tau_i\|_F^2 + \rho \|\Delta - \sum_i w_i \tau_i\|_F^2$,

    which is least squares in the core of the deltas: $\Delta = (\sum_i w_i \tau_i G_i + \rho \sum_i w_i \tau_i)
    (\sum_i G_i + \rho)^{-1}$ with $G_i = \tau_i^T \tau_i / \|\tau_i\|_F^2$, with $\rho$ being `ridge` times the mean
    eigenvalue of $\sum_i G_i$ over the directions that a delta reads; on the others the result is zero. No [out in]
    matrix is formed. Biases and other vectors have one input, which all adapters read, and are averaged.

    Weights say how strongly each adapter's action counts; they are not shares. Adapters that read the same
    inputs are averaged there, so give each weight 1 for the paper's form. Where they read nearly the same inputs and
    answer differently, only a `ridge` keeps the result from growing.

    Args:
        ridge: How much the weighted sum counts; 0 is the minimum of the paper's objective.
        gain: $\lambda$, a factor on the result.

    Shapes: k updates [out in] give one [out in] of rank at most $\sum_i r_i$.
    Differs from the paper: the minimum in closed form, where the authors take 300 steps of Adam from the sum, at a rate
    of 1e-5, and so end near the sum; a ridge, which they do not need for that reason; weights. Deltas that are zero do
    not count.
    Exact when: there is one adapter, or the directions that adapters read are orthogonal to each other.
    Reference: Cheng et al., Whoever Started the Interference Should End It, ICML 2025, arXiv 2503.08099, section 4.
    """

    factor: ClassVar[str | None] = "gain"

    ridge: float = 0.01
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.ridge < 0:
            raise InvalidValueError(f"ridge must be at least 0, got {self.ridge!r}", code="method.ridge")

    def __call__(self, stack: Stack) -> Update:
        """Solve in the core."""
        core = core_of(stack.updates)
        acting = [(part, weight) for part, weight in zip(core.parts, stack.weights, strict=True) if bool(part.any())]
        total = torch.zeros_like(core.parts[0])
        for part, weight in acting:
            total += weight * part
        if not acting:
            return core.update(total, stack.dtype)
        units = [part / torch.linalg.matrix_norm(part) for part, _ in acting]
        expected = [weight * (part @ unit.T) for (part, weight), unit in zip(acting, units, strict=True)]
        merged = _least_squares(torch.cat(units), torch.cat(expected, dim=1), total, self.ridge)
        return core.update(merged * self.gain, stack.dtype)


def _least_squares(rows: Tensor, targets: Tensor, start: Tensor, ridge: float) -> Tensor:
    r"""Return the matrix X that minimises $\|X rows^T - targets\|_F^2 + \rho \|X - start\|_F^2$.

    By the SVD of `rows` and not by its Gram matrix, whose condition is the square of it.

    Args:
        rows: Inputs.
        targets: What X is to make of them.
        start: What X is on directions that no input has.
        ridge: $\rho$ as a share of the mean eigenvalue of $rows^T rows$.

    Shapes: rows [m q], targets [p m], start [p q]; the result is [p q].
    """
    u, sigma, vh = torch.linalg.svd(rows, full_matrices=False)
    seen = numerical_rank(sigma, (rows.shape[0], rows.shape[1]))
    u, sigma, vh = u[:, :seen], sigma[:seen], vh[:seen]
    rho = ridge * float(sigma.square().sum()) / rows.shape[1]
    missing = targets @ u - (start @ vh.T) * sigma  # residual of the start, by direction
    solved: Tensor = start + (missing * sigma / (sigma.square() + rho)) @ vh
    return solved
