"""Singular values of full matrices, and how far apart two sets of them are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

GRAM_SIDE = 1024
"""Shorter side above which singular values come from the Gram matrix."""
GRAM_ASPECT = 16
"""Ratio of the sides above which the Gram matrix is used too, as for embeddings."""
_ROWS = 8192


def gram(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "k k"]:
    """Return the smaller of W^T W and W W^T in float64, summed over slices so that W is never held in float64 whole."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in torch.split(tall, _ROWS):
        part = rows.double()
        total += part.T @ part
    return total


def dense_singular_values(
    matrix: Float[Tensor, "m n"], *, side: int = GRAM_SIDE, aspect: int = GRAM_ASPECT
) -> Float[Tensor, " k"]:
    r"""Return all min(m, n) singular values, descending, in float64.

    A float64 SVD is used up to a shorter side of `side` (errors near $10^{-16} \sigma_{max}$). Larger or very long
    matrices use the eigenvalues of the Gram matrix in float64, which is several times faster, with errors near
    $10^{-16} \sigma_{max}^2 / \sigma_i$, at most about $10^{-8} \sigma_{max}$ for the smallest ones.
    """
    shorter, longer = sorted(matrix.shape)
    if shorter <= side and longer <= aspect * shorter:
        values: Tensor = torch.linalg.svdvals(matrix.double())
        return values
    squares: Tensor = torch.linalg.eigvalsh(gram(matrix))
    return squares.clamp(min=0.0).sqrt().flip(0)


def spectral_norm(matrix: Float[Tensor, "m n"]) -> float:
    """Return the largest singular value, from the Gram matrix in float64."""
    return float(torch.linalg.eigvalsh(gram(matrix))[-1].clamp(min=0.0).sqrt())


def spectral_distance(x: Float[Tensor, " k"], y: Float[Tensor, " l"]) -> float:
    r"""Return $\|\sigma_x - \sigma_y\|_2$ of two descending lists of singular values; missing ones are zero.

    The distance is at most $\|W_x - W_y\|_F$ (Mirsky, 1960), at least the difference of the norms, and 0 for matrices
    that differ only by orthogonal factors.
    """
    longest = max(x.shape[0], y.shape[0])
    padded = [torch.nn.functional.pad(s, (0, longest - s.shape[0])) for s in (x, y)]
    return float(torch.linalg.vector_norm(padded[1] - padded[0]))
