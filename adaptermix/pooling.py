"""One vector per sentence."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def masked_mean(hidden: Float[Tensor, "rows tokens d"], mask: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows d"]:
    r"""Return the mean of the hidden states over tokens where the mask is 1, in float32.

    $h(x) = \sum_t m_t H_t / \sum_t m_t$, with half-precision states cast up before they are added.
    """
    weights = mask.to(hidden.device).unsqueeze(-1).float()
    total: Tensor = (hidden.float() * weights).sum(1)
    return total / weights.sum(1).clamp_min(1.0)
