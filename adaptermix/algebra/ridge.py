"""Ridge regression in closed form: of rows, with penalties chosen by leaving groups out, and of sums of products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .updates import LowRank


@dataclass(frozen=True, slots=True)
class AffineMap:
    r"""The map $x \mapsto (x - \bar x) W + \bar y$.

    Args:
        weight: $W$.
        center: $\bar x$.
        offset: $\bar y$.
        penalty: The ridge penalty $\lambda$ relative to the mean squared singular value of the centred rows.
        left_out: Share of the squared targets that is explained when each group is predicted without it.

    Shapes: weight [d e], center [d], offset [e], in float64.
    """

    weight: Float[Tensor, "d e"]
    center: Float[Tensor, " d"]
    offset: Float[Tensor, " e"]
    penalty: float = 0.0
    left_out: float | None = None

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch e"]:
        """Return the images of vectors, in float64."""
        return (x.double() - self.center) @ self.weight + self.offset


def left_out_residuals(
    residuals: Float[Tensor, "n e"], hat: Float[Tensor, "n k"], groups: Int[Tensor, " n"]
) -> Float[Tensor, "n e"]:
    r"""Return the residuals of every group under the fit to all other groups, without refitting.

    For a linear smoother with a quadratic penalty these are $(I - H_{gg})^{-1} e_g$, where $H = K K^T$ is the hat
    matrix; groups of one row give the formula of leave-one-out, $e_i / (1 - h_{ii})$.

    Args:
        residuals: Residuals of the fit to all rows.
        hat: A factor $K$ of the hat matrix.
        groups: Number of each row's group.

    Shapes: residuals [n e], hat [n k], groups [n]; returns [n e].
    Reference: Golub, Heath and Wahba, Technometrics 21(2), 1979, equation 2.2, for groups of one.
    """
    result = torch.empty_like(residuals)
    order = groups.argsort(stable=True)
    sizes = torch.unique_consecutive(groups[order], return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    for size in torch.unique(sizes).tolist():  # groups of one size are solved together
        rows = order[starts[sizes == size, None] + torch.arange(size, device=order.device)]
        block = hat[rows]
        eye = torch.eye(size, dtype=block.dtype, device=block.device)
        result[rows] = torch.linalg.solve(eye - block @ block.mT, residuals[rows])
    return result


def ridge_map(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n e"],
    *,
    groups: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    penalties: Sequence[float],
) -> AffineMap:
    r"""Fit $\sum_i w_i \|y_i - (x_i - \bar x) W - \bar y\|^2 + \lambda \|W\|^2$, with the penalty that predicts best.

    Every penalty is judged by the rows of each group as the fit to the other groups predicts them, in closed form (see
    `left_out_residuals`), so rows that belong together, such as a sentence and its translation, never judge a fit that
    has seen one of them. Computed in float64 from the eigenvectors of the weighted covariance.

    Args:
        x: Inputs.
        y: Targets.
        groups: Number of each row's group.
        weights: Weight of each row, above zero.
        penalties: Values of $\lambda$ to choose from, relative to the mean squared singular value of the centred and
            weighted inputs.

    Shapes: x [n d], y [n e], groups and weights [n].
    """
    root = weights.double().sqrt()[:, None]
    total = root.square().sum()
    center, offset = ((root.square() * side.double()).sum(0) / total for side in (x, y))
    scaled, expected = (root * (side.double() - mean) for side, mean in ((x, center), (y, offset)))
    values, vectors = torch.linalg.eigh(scaled.T @ scaled)
    values = values.clamp_min(0.0)
    scores, rotated = scaled @ vectors, vectors.T @ (scaled.T @ expected)
    # of a constant input no penalty matters, and none may be zero
    scale = float(values.mean()) or 1.0
    whole = float((root * y.double()).square().sum()) or 1.0
    shares = {}
    for penalty in penalties:
        shrunk = (values + penalty * scale).reciprocal()
        residuals = expected - scores @ (shrunk[:, None] * rotated)
        hat = torch.cat([scores * shrunk.sqrt(), root / total.sqrt()], dim=1)
        shares[penalty] = 1 - float(left_out_residuals(residuals, hat, groups).square().sum()) / whole
    chosen = max(shares, key=lambda penalty: shares[penalty])
    weight = vectors @ ((values + chosen * scale).reciprocal()[:, None] * rotated)
    return AffineMap(weight, center, offset, chosen, shares[chosen])


class Products:
    r"""Sums over weighted rows of inputs z and targets t, from which least squares are solved without the rows.

    Args:
        inner: $\sum w z z^T$.
        cross: $\sum w z t^T$.
        outer: $\sum w t t^T$.

    Shapes: inner [i i], cross [i o], outer [o o], in float64.
    """

    def __init__(self, inner: Float[Tensor, "i i"], cross: Float[Tensor, "i o"], outer: Float[Tensor, "o o"]) -> None:
        self.inner, self.cross, self.outer = inner, cross, outer

    @classmethod
    def empty(cls, inputs: int, targets: int, device: torch.device | None = None) -> Products:
        """Return the sums over no rows."""
        shapes = (inputs, inputs), (inputs, targets), (targets, targets)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, z: Float[Tensor, "rows i"], t: Float[Tensor, "rows o"], weights: Float[Tensor, " rows"]) -> None:
        """Add rows."""
        root = weights.double().sqrt()[:, None]
        z, t = root * z.double(), root * t.double()
        self.inner.addmm_(z.T, z)
        self.cross.addmm_(z.T, t)
        self.outer.addmm_(t.T, t)

    def __add__(self, other: Products) -> Products:
        """Return the sums over the rows of both."""
        return Products(self.inner + other.inner, self.cross + other.cross, self.outer + other.outer)

    def mapped(self, matrix: Float[Tensor, "o p"]) -> Products:
        """Return the sums for targets that are multiplied by a matrix from the right."""
        return Products(self.inner, self.cross @ matrix, matrix.T @ self.outer @ matrix)

    @property
    def square(self) -> float:
        r"""$\sum w \|t\|^2$."""
        return float(self.outer.trace())

    def error(self, solution: Float[Tensor, "i o"]) -> float:
        r"""Return $\sum w \|t - z S\|^2$ of a solution S."""
        return self.square + float((solution * (self.inner @ solution - 2 * self.cross)).sum())


def solve_ridge(products: Products, penalty: float) -> Float[Tensor, "i o"]:
    r"""Return $S = (\sum w z z^T + \lambda I)^{-1} \sum w z t^T$; `penalty` is relative to the mean diagonal entry."""
    return torch.cholesky_solve(products.cross, torch.linalg.cholesky(_penalised(products, penalty)))


def _penalised(products: Products, penalty: float) -> Tensor:
    inner = products.inner.clone()
    inner.diagonal().add_(penalty * (float(inner.diagonal().mean()) or 1.0))
    return inner


def choose_penalty(parts: Sequence[Products], penalties: Sequence[float]) -> tuple[float, float]:
    """Return the penalty under which the other parts predict each part best, and the share of its targets explained.

    Args:
        parts: Sums over disjoint rows, at least two.
        penalties: Values to choose from, relative to the mean diagonal entry of the inputs' products.
    """
    others = [_sum([other for other in parts if other is not part]) for part in parts]
    whole = sum(part.square for part in parts) or 1.0
    result = [
        (sum(part.error(solve_ridge(rest, penalty)) for part, rest in zip(parts, others, strict=True)), penalty)
        for penalty in penalties
    ]
    error, penalty = min(result)
    return penalty, 1 - error / whole


def _sum(parts: Sequence[Products]) -> Products:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def reduced_rank(products: Products, *, rank: int, penalty: float) -> LowRank:
    r"""Return the update $\Delta$ of at most a rank that minimises $\sum w \|t - \Delta z\|^2 + \lambda \|\Delta\|^2$.

    With the ridge solution S, so that $\Delta = S^T$ at full rank, the best of rank r is $\Delta = V_r V_r^T S^T$,
    where $V_r$ are the leading eigenvectors of $S^T (\sum w z z^T + \lambda I) S = S^T \sum w z t^T$.

    Args:
        products: Sums of products of inputs and targets.
        rank: Most rank.
        penalty: $\lambda$ relative to the mean diagonal entry of the inputs' products.

    Shapes: an update [targets inputs] in float64, scale 1.
    Reference: Mukherjee and Zhu, Reduced rank ridge regression, Statistical Analysis and Data Mining 4(6), 2011.
    """
    solution = solve_ridge(products, penalty)
    gain = solution.T @ products.cross
    vectors = torch.linalg.eigh((gain + gain.T) / 2)[1].flip(1)[:, : min(rank, *solution.shape)]
    return LowRank(b=vectors.contiguous(), a=(solution @ vectors).T.contiguous())
