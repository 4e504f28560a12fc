"""The Karcher mean of directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..algebra import Stack, inner_products
from ..errors import InvalidValueError
from .base import LinearMethod, method


@method("karcher")
@dataclass(frozen=True, slots=True, kw_only=True)
class Karcher(LinearMethod):
    r"""Mean of the directions of the deltas on the sphere, at their mean length.

    $u = \arg\min_u \sum_i v_i \, angle(u, \tau_i / |\tau_i|)^2$ with $v_i = w_i / \sum_j w_j$, found by gradient steps
    in the tangent space; $\Delta = (\sum_i w_i |\tau_i|) u$. All steps stay in the span of the deltas, so they only
    need the inner products, which come from the factors; the result stays low rank.

    Args:
        iterations: Most steps.
        tolerance: Length of a step, in radians, at which to stop.

    Shapes: k updates [out in] give one [out in].
    Differs from mergekit: weights; more iterations; deltas instead of whole weights.
    Exact when: all deltas are parallel.
    Reference: Karcher, Riemannian Center of Mass, Comm. Pure Appl. Math. 1977; mergekit, `karcher`.
    """

    depends_on_deltas: ClassVar[bool] = True
    iterations: int = 100
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InvalidValueError(f"iterations must be at least 1, got {self.iterations!r}", code="method.iterations")

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return the coefficients of the mean in terms of the deltas.

        Raises:
            ValueError: a negative weight, or directions that cancel.
        """
        weights = torch.tensor(stack.weights, dtype=torch.float64)
        if float(weights.min()) < 0:
            raise InvalidValueError(
                f"karcher needs weights of at least 0, got {list(stack.weights)}", code="method.negative-weight"
            )
        gram = inner_products(stack.updates)
        lengths = gram.diagonal().clamp(min=0).sqrt()
        acts = (lengths > 0) & (weights > 0)
        if int(acts.sum()) < 2:
            return stack.weights
        cosines = (gram[acts][:, acts] / lengths[acts].outer(lengths[acts])).clamp(-1, 1)
        shares = weights[acts] / weights[acts].sum()
        mean = self._mean(cosines, shares)
        result = torch.zeros_like(weights)
        # `found` is the direction's coefficients times the mean length
        result[acts] = mean / lengths[acts] * float((weights[acts] * lengths[acts]).sum())
        return [float(value) for value in result]

    def _mean(self, cosines: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the unit mean direction as coefficients of the unit directions."""

        def unit(c: torch.Tensor) -> torch.Tensor:
            size = float((c @ cosines @ c).clamp(min=0).sqrt())
            if size < 1e-8:
                raise InvalidValueError(
                    "karcher needs directions that do not cancel, and these do", code="method.cancel"
                )
            return c / size

        mean = unit(shares)
        for _ in range(self.iterations):
            along = (cosines @ mean).clamp(-1, 1)
            angles = torch.arccos(along)
            sines = torch.sin(angles)
            factors = torch.where(sines > 1e-12, angles / sines.clamp(min=1e-300), 1.0) * shares
            step = factors - (factors * along).sum() * mean
            size = float((step @ cosines @ step).clamp(min=0).sqrt())
            if size <= self.tolerance:
                break
            mean = unit(torch.cos(torch.tensor(size)) * mean + torch.sin(torch.tensor(size)) / size * step)
        return mean
