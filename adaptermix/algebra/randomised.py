"""Best low-rank approximation of a dense matrix by block power iteration, with a bound on what it misses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .updates import LowRank

EXACT_SIDE = 256
"""Matrices whose smaller side is at most this long are decomposed exactly."""
_OVERSAMPLE, _PROBES, _MOST = 16, 16, 24
_SMALL = 1e-3
# P(a standard normal is below 1/ALPHA in size) <= sqrt(2/pi)/ALPHA: 16 probes miss together with probability < 1e-8.
_ALPHA = math.sqrt(2 / math.pi) * math.sqrt(10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Approximation:
    """A low-rank approximation and its error.

    Args:
        update: The approximation.
        residual: Share of the matrix's Frobenius norm that is lost, measured.
        excess: Upper bound on (residual - least) / max(least, 1e-3), `least` being the least possible residual of this
            rank; 0 where the decomposition is exact. It fails with probability below 1e-8.
    """

    update: LowRank
    residual: float
    excess: float


def _balanced(u: Tensor, sigma: Tensor, vh: Tensor, dtype: torch.dtype) -> LowRank:
    root = sigma.sqrt()
    return LowRank(b=(u * root).to(dtype), a=(root[:, None] * vh).to(dtype))


def frobenius(matrix: Float[Tensor, "out in"]) -> float:
    """Return the Frobenius norm, summed in float64 without a float64 copy of the matrix."""
    return math.hypot(
        *(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in torch.split(matrix, 256))
    )


def _residual(matrix: Tensor, low: LowRank) -> float:
    parts = zip(torch.split(matrix, 256), torch.split(low.b, 256), strict=True)
    return math.hypot(
        *(float(torch.linalg.vector_norm(m - b.to(m) @ low.a.to(m), dtype=torch.float64)) for m, b in parts)
    )


def least_rank(sigma: Float[Tensor, " r"], keep: float, *, total: float | None = None) -> int:
    """Return the least rank whose singular values hold this share of the squared norm, at least 1.

    Args:
        sigma: Singular values, descending.
        keep: Share of the squared norm to keep, in (0, 1].
        total: Squared norm, where `sigma` is not all of them.
    """
    squares = sigma.double().square().cumsum(0)
    total = float(squares[-1]) if total is None else total
    if total == 0:
        return 1
    # A hair below, since a sum of floats need not reach its own total.
    enough = torch.nonzero(squares >= keep * total * (1 - 1e-12)).flatten()
    return int(enough[0]) + 1 if len(enough) else len(sigma)


def decompose_exactly(matrix: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD in float64."""
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, sigma, vh


def _exact(matrix: Tensor, rank: int) -> Approximation:
    u, sigma, vh = decompose_exactly(matrix)
    total = float(torch.linalg.vector_norm(sigma))
    lost = float(torch.linalg.vector_norm(sigma[rank:]))
    low = _balanced(u[:, :rank], sigma[:rank], vh[:rank], matrix.dtype)
    return Approximation(update=low, residual=lost / total if total > 0 else 0.0, excess=0.0)


def _start(width: int, count: int, like: Tensor) -> Tensor:
    # A fixed seed: the approximation is a function of the matrix alone.
    generator = torch.Generator().manual_seed(20110909)
    return torch.randn(width, count, generator=generator, dtype=torch.float32).to(like)


def _outside(matrix: Tensor, basis: Tensor, steps: int) -> float:
    r"""Bound $\|(I - VV^T) M^T M (I - VV^T)\|_2$ from above, by power iteration on Gaussian probes (see `_ALPHA`)."""

    def project(x: Tensor) -> Tensor:
        return x - basis @ (basis.T @ x)

    probes = project(_start(matrix.shape[1], _PROBES, matrix))
    log = 0.0
    for _ in range(steps):
        probes = project(matrix.T @ (matrix @ probes))
        size = float(torch.linalg.vector_norm(probes, dim=0).max())
        if size == 0 or not math.isfinite(size):
            return 0.0 if size == 0 else math.inf
        probes /= size
        log += math.log(size)
    return math.exp((log + math.log(_ALPHA)) / steps)


def _optimum_bound(theta: Tensor, residual: float, outside: float) -> float:
    """Bound the sum of as many largest eigenvalues of M^T M from above.

    In the basis (V, V_perp) the matrix is diag(Theta, C) plus an off-diagonal block R. By Weyl its eigenvalues exceed
    those of the diagonal by at most ||R||, and by at most ||R||^2 / gap where there is a gap to C (Li and Li, 2005).
    """
    bound = 0.0
    for value in theta.tolist():
        gap = value - outside
        shift = min(residual, residual**2 / gap) if gap > 0 else residual
        bound += max(value, outside) + shift
    return bound


def truncate(matrix: Float[Tensor, "out in"], rank: int, *, tolerance: float = 0.01) -> Approximation:
    r"""Return an approximation of rank r whose residual is at most 1 % above the least possible, and report it.

    Block power iteration from a fixed start (Halko, Martinsson and Tropp, 2011, algorithm 4.4) until a bound on the sum
    of the r largest eigenvalues of $M^T M$ shows that no more than the tolerance is missing; where 24 rounds do not get
    there, the exact SVD. Memory beyond the matrix: a few [out r] and [in r].

    Args:
        matrix: The matrix to approximate.
        rank: Requested rank, at least 1.
        tolerance: Excess of the residual over the optimum that is allowed.

    Shapes: [out in] gives factors [out r] and [r in], r = min(rank, out, in), in the matrix's dtype.

    Raises:
        ValueError: a rank below 1, or a matrix that is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if matrix.shape[0] < matrix.shape[1]:
        other = truncate(matrix.T, rank, tolerance=tolerance)
        return Approximation(
            update=LowRank(b=other.update.a.T.contiguous(), a=other.update.b.T.contiguous()),
            residual=other.residual,
            excess=other.excess,
        )
    total = frobenius(matrix)
    if not math.isfinite(total):
        raise ValueError("a finite matrix is needed to recompress, and this one has an entry that is not, or overflows")
    side = matrix.shape[1]
    width = min(side, rank + max(_OVERSAMPLE, rank // 2))
    if side <= EXACT_SIDE or 3 * width >= side or total == 0:
        return _exact(matrix, rank)
    return _iterate(matrix, rank, width, total, tolerance)


def _iterate(matrix: Tensor, rank: int, width: int, total: float, tolerance: float) -> Approximation:
    v = torch.linalg.qr(_start(matrix.shape[1], width, matrix)).Q
    before = 0.0
    for number in range(_MOST):
        q, r = torch.linalg.qr(matrix @ v)
        z = matrix.T @ q
        gram = (r.double().T @ r.double()).to(v)
        off = float(torch.linalg.matrix_norm((z @ r - v @ gram).double(), 2))
        theta = torch.linalg.eigvalsh(r.double().T @ r.double()).flip(0)
        captured = float(theta[:rank].sum())
        settled = number > 1 and captured - before < 0.02 * tolerance * max(total**2 - captured, 1e-12 * total**2)
        if settled or number == _MOST - 1:
            lost = max(total**2 - captured, 0.0)
            result = _judge(matrix, v, theta[:rank], off, lost)
            small = lost < (_SMALL * total) ** 2
            if result <= tolerance or small:
                low = _finish(q, z, rank).to(matrix.dtype)
                residual = _residual(matrix, low) / total
                # A small residual contains the rounding errors of the products, which the bound does not see.
                excess = residual / _SMALL if small else max(result, 0.0)
                return Approximation(update=low, residual=residual, excess=excess)
        before = captured
        v = torch.linalg.qr(z).Q
    return _exact(matrix, rank)


def _judge(matrix: Tensor, v: Tensor, theta: Tensor, off: float, lost: float) -> float:
    """Return the bound on the excess of the residual over the optimum, given the squared norm lost so far."""
    captured, excess = float(theta.sum()), math.inf
    for steps in (2, 6):
        missing = _optimum_bound(theta, off, _outside(matrix, v, steps)) - captured
        excess = math.sqrt(lost / (lost - missing)) - 1 if missing < lost else math.inf
        if excess <= 0.01:
            break
    return excess


def _finish(q: Tensor, z: Tensor, rank: int) -> LowRank:
    q_z, r_z = torch.linalg.qr(z)
    u, sigma, vh = torch.linalg.svd(r_z.double().T, full_matrices=False)
    return _balanced(q.double() @ u[:, :rank], sigma[:rank], vh[:rank] @ q_z.double().T, torch.float64)
