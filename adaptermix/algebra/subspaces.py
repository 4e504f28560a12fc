"""Subspaces of low-rank updates: which directions they write to and read from, and how far two of them share these."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .updates import LowRank

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    r"""The thin SVD $\Delta = U \Sigma V^T$ of an update, cut at its numerical rank k; a zero update has k = 0.

    Args:
        left: Orthonormal basis U of the column space, which is that of B: the directions the update writes to.
        sigma: Singular values, descending, all above zero.
        right: Orthonormal basis V of the row space, which is that of A: the directions the update reads.

    Shapes: left is [out k], sigma [k], right [in k]; float64.
    """

    left: Float[Tensor, "out k"]
    sigma: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]

    @property
    def rank(self) -> int:
        """Numerical rank of the update."""
        return self.sigma.shape[0]

    @property
    def norm(self) -> float:
        """Frobenius norm of the update; hypot, since squares of large scales overflow."""
        return math.hypot(*self.sigma.tolist())

    @property
    def stable_rank(self) -> float:
        r"""Return $\|\Delta\|_F^2 / \|\Delta\|_2^2$, from 1 to k; 0 for a zero update."""
        return float((self.sigma / self.sigma[0]).square().sum()) if self.rank else 0.0


def numerical_rank(sigma: Float[Tensor, " r"], shape: tuple[int, int], *, size: float | None = None) -> int:
    r"""Return how many singular values are above rounding errors: $\sigma > \max(shape) \cdot \epsilon \cdot size$.

    The epsilon is that of float64, regardless of the dtype of the files: stored factors count as exact, since a model
    applies them, so the only rounding is that of the arithmetic here. (With the epsilon of bfloat16, 2^-7, the rule
    would find no rank at all in a module of 128 or more rows.)

    Args:
        sigma: Singular values, descending.
        shape: Shape of the matrix that they belong to.
        size: What rounding errors are relative to; default the largest singular value.
    """
    if not sigma.numel():
        return 0
    threshold = max(shape) * EPSILON * (float(sigma[0]) if size is None else size)
    return int((sigma > threshold).sum())


def frame(update: LowRank) -> Frame:
    r"""Return the frame of an update from two thin QRs and the SVD of an r x r core; no [out in] matrix is formed.

    The numerical rank is that of `numerical_rank` with $size = |s| \|B\|_2 \|A\|_2 \ge \sigma_{max}$: where the factors
    cancel ($B A = 0$ with neither zero), the largest singular value is itself rounding.

    Raises:
        ValueError: the update is not finite in float64.
    """
    q_b, r_b = torch.linalg.qr(update.b.double())
    q_a, r_a = torch.linalg.qr(update.a.double().T)
    core = r_b @ r_a.T
    # The finished numbers are looked at, since a scale of 1e308 overflows only there.
    if not (torch.isfinite(core).all() and math.isfinite(update.scale * float(core.abs().sum()))):
        raise ValueError(f"an update must be finite in float64, and overflows with scale {update.scale:g}")
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    size = float(torch.linalg.matrix_norm(r_b, 2) * torch.linalg.matrix_norm(r_a, 2)) if core.numel() else 0.0
    rank = numerical_rank(sigma, update.shape, size=size) if update.scale else 0
    sign = math.copysign(1.0, update.scale)
    return Frame(left=q_b @ u[:, :rank] * sign, sigma=sigma[:rank] * abs(update.scale), right=q_a @ vh[:rank].T)


def overlap(x: Float[Tensor, "n k"], y: Float[Tensor, "n l"]) -> float | None:
    r"""Return the mean squared cosine of the principal angles, $\|X^T Y\|_F^2 / \min(k, l)$, in [0, 1].

    1 where one subspace holds the other, 0 where they are orthogonal, and max(k, l)/n on average for subspaces drawn at
    random (`chance_overlap`); None where one is empty. Hu et al., LoRA, 2021, arXiv 2106.09685, section 7.2 and
    appendix G, use the same measure.

    Shapes: orthonormal bases [n k] and [n l].
    """
    smaller = min(x.shape[1], y.shape[1])
    return min(1.0, float((x.T @ y).square().sum()) / smaller) if smaller else None


def chance_overlap(k: int, l: int, n: int) -> float:  # noqa: E741  (dimensions k and l, as in `overlap`)
    """Return the expected `overlap` of random subspaces of dimensions k and l in n dimensions: max(k, l)/n."""
    return max(k, l) / n


def frame_cosine(x: Frame, y: Frame) -> float | None:
    r"""Return the cosine of the angle between two updates; None where one is zero, and there is no angle.

    $\sum_{ij} \sigma_i \tau_j (U_x^T U_y)_{ij} (V_x^T V_y)_{ij}$ over the product of the norms.
    """
    if not (x.rank and y.rank):
        return None
    products = (x.left.T @ y.left) * (x.right.T @ y.right)
    weights = torch.outer(x.sigma / x.norm, y.sigma / y.norm)
    return max(-1.0, min(1.0, float((products * weights).sum())))


def share_within(x: Frame, y: Frame) -> float | None:
    r"""Return the share of the squared norm of x in the subspaces of y: $\|P_U \Delta_x P_V\|_F^2 / \|\Delta_x\|_F^2$.

    $P_U$ and $P_V$ project onto the column and row space of y. In [0, 1]; 0 if y is zero, None if x is.
    """
    if not x.rank:
        return None
    inside = (y.left.T @ x.left) * (x.sigma / x.norm) @ (x.right.T @ y.right)
    return min(1.0, float(inside.square().sum()))
