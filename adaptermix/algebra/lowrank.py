"""Exact sums and best approximations of low-rank updates, without the dense matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .updates import Dense, LowRank, Update


def working_dtype(updates: Sequence[Update]) -> torch.dtype:
    """Return the widest dtype of the tensors, at least float32: half precision is only for storage."""
    dtype = torch.float32
    for update in updates:
        for tensor in (update.w,) if isinstance(update, Dense) else (update.a, update.b):
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def concatenate(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    r"""Return the exact weighted sum $\sum_i w_i s_i B_i A_i$ in factored form.

    The factors are laid side by side: $B = [B_1 \dots B_k]$ and $A$ the rows $w_i s_i A_i$, so there are no cross
    terms, and the rank is the sum of the ranks.

    Args:
        updates: Updates of one module; ranks, scales and dtypes may differ.
        weights: One factor per update; any sign. Updates of weight zero add no rank.

    Shapes: k updates of [out in] give one of [out in], scale 1.

    Raises:
        ValueError: no update, shapes that differ, or a count of weights that does not match.

    Example:
        >>> one = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2))
        >>> concatenate([one, one], [0.9, 0.1]).dense()
        tensor([[1., 1.],
                [1., 1.]])
    """
    shapes = {update.shape for update in updates}
    if len(shapes) != 1:
        raise ValueError(f"updates of one shape are needed, got {sorted(shapes)}")
    pairs = list(zip(updates, weights, strict=True))
    dtype = working_dtype(updates)
    kept = [(u, w) for u, w in pairs if w != 0] or [(pairs[0][0], 0.0)]
    ranks = [update.rank for update, _ in kept]
    out, into = kept[0][0].shape
    device = kept[0][0].a.device
    b, a = (torch.empty(shape, dtype=dtype, device=device) for shape in ((out, sum(ranks)), (sum(ranks), into)))
    for (update, weight), left, right in zip(kept, b.split(ranks, dim=1), a.split(ranks), strict=True):  # type: ignore[no-untyped-call]
        left.copy_(update.b)
        torch.mul(update.a.to(dtype), weight * update.scale, out=right)
    return LowRank(b=b, a=a)


def decompose(
    update: LowRank,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, " r"], Float[Tensor, "r in"]]:
    """Return the thin SVD (U, sigma, V^T) of the update from two QRs and the SVD of an r x r core, in float64."""
    q_b, r_b = torch.linalg.qr(update.b.double())
    q_a, r_a = torch.linalg.qr(update.a.double().T)
    u, sigma, vh = torch.linalg.svd(update.scale * (r_b @ r_a.T), full_matrices=False)
    return q_b @ u, sigma, vh @ q_a.T


def singular_values(update: LowRank) -> Float[Tensor, " r"]:
    """Return the (at most r) singular values of the update, descending, in float64."""
    return decompose(update)[1]


def recompress(update: LowRank, rank: int) -> tuple[LowRank, float]:
    r"""Return the best approximation of an update by one of a smaller rank, and the loss.

    With $\Delta = U \Sigma V^T$ the result is $U_r \Sigma_r V_r^T$ (Eckart and Young, 1936), with
    $\sqrt{\Sigma_r}$ on both factors so that neither loses more than the other when cast down. Cost is that of two
    thin QRs and an R x R SVD, where R is the rank of the input; no [out in] matrix is formed.

    Args:
        update: The update to approximate.
        rank: Requested rank, at least 1; a rank at or above the input's keeps everything.

    Shapes: [out in] of rank R in, [out in] of rank min(rank, R, out, in) out, scale 1, in the input's working dtype.

    Returns:
        The approximation and the residual $\sqrt{\sum_{i>r}\sigma_i^2} / \sqrt{\sum_i \sigma_i^2}$, in [0, 1].

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    u, sigma, vh = decompose(update)
    return balanced(u, sigma, vh, rank=rank, dtype=working_dtype([update])), lost_share(sigma, rank)


def lost_share(sigma: Float[Tensor, " r"], rank: int) -> float:
    r"""Return $\sqrt{\sum_{i>rank}\sigma_i^2} / \sqrt{\sum_i \sigma_i^2}$, 0 for a zero update."""
    total = float(torch.linalg.vector_norm(sigma))
    return float(torch.linalg.vector_norm(sigma[rank:])) / total if total > 0 else 0.0


def balanced(
    u: Float[Tensor, "out r"], sigma: Float[Tensor, " r"], vh: Float[Tensor, "r in"], *, rank: int, dtype: torch.dtype
) -> LowRank:
    """Return the leading triplets of an SVD as factors, the roots of the singular values on both sides."""
    root = sigma[:rank].sqrt()
    return LowRank(b=(u[:, :rank] * root).to(dtype), a=(root[:, None] * vh[:rank]).to(dtype))


def factored(update: Update) -> LowRank:
    """Return an update in factored form; a dense one through its exact thin SVD, so of full rank."""
    if isinstance(update, LowRank):
        return update
    u, sigma, vh = torch.linalg.svd(update.w.double(), full_matrices=False)
    root = sigma.sqrt()
    dtype = working_dtype([update])
    return LowRank(b=(u * root).to(dtype), a=(root[:, None] * vh).to(dtype))
