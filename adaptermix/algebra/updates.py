"""The values of the algebra: what one adapter adds to one weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    # A sum is not finite if an entry is not; one that itself overflows is examined entry by entry.
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return bool(torch.isfinite(tensor.sum(dtype=wide))) or bool(torch.isfinite(tensor).all())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    r"""An update in factored form, $\Delta = scale \cdot B A$.

    Args:
        b: Left factor.
        a: Right factor.
        scale: Factor on the product; alpha/r or alpha/sqrt(r) of its adapter.

    Shapes: b is [out r], a is [r in]; the update is [out in].

    Raises:
        ValueError: the two factors disagree about the rank.

    Example:
        >>> LowRank(b=torch.tensor([[1.0], [2.0]]), a=torch.tensor([[3.0, 4.0]]), scale=0.5).dense()
        tensor([[1.5000, 2.0000],
                [3.0000, 4.0000]])
    """

    b: Float[Tensor, "out r"]
    a: Float[Tensor, "r in"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.b.shape[1] != self.a.shape[0]:
            raise ValueError(
                f"both factors must have the same rank, got b {list(self.b.shape)} and a {list(self.a.shape)}"
            )

    @property
    def rank(self) -> int:
        """Rows of `a`: an upper bound of the true rank."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense update."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> Float[Tensor, "out in"]:
        """Return the update as a matrix, in the dtype of the factors."""
        return self.scale * (self.b @ self.a)

    def __mul__(self, weight: float) -> LowRank:
        return LowRank(b=self.b, a=self.a, scale=self.scale * weight)

    __rmul__ = __mul__

    def to(self, dtype: torch.dtype) -> LowRank:
        """Return the update with its factors in another dtype."""
        return LowRank(b=self.b.to(dtype), a=self.a.to(dtype), scale=self.scale)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dense:
    """An update as a full matrix, for results that are not low rank.

    Shapes: w is [out in].
    """

    w: Float[Tensor, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the update."""
        return self.w.shape[0], self.w.shape[1]

    def dense(self) -> Float[Tensor, "out in"]:
        """Return the matrix itself."""
        return self.w

    def __mul__(self, weight: float) -> Dense:
        return Dense(w=self.w * weight)

    __rmul__ = __mul__

    def to(self, dtype: torch.dtype) -> Dense:
        """Return the update in another dtype."""
        return Dense(w=self.w.to(dtype))


Update = LowRank | Dense
"""What one adapter, or one checkpoint, adds to one weight matrix."""
