"""OLoRA: training begins from the QR decomposition of the base weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...algebra import LowRank
from .lora import less
from .pissa import FromBase


class Olora(FromBase):
    """OLoRA (Büyükakyüz, 2024)."""

    initial = "olora"

    def plain(self, update: LowRank, weight: Float[Tensor, "out in"]) -> LowRank:
        return olora_delta(update, weight)


def olora_delta(update: LowRank, weight: Float[Tensor, "out in"]) -> LowRank:
    r"""Return the delta of an OLoRA that was saved as it was trained, $\Delta = s (B A - Q_r R_r)$ with $W = Q R$.

    $Q_r$ spans the first r columns of the base weight, and $R_r = Q_r^T W$, whatever the signs of Q.

    Args:
        update: The trained factors with their scale.
        weight: The base weight.

    Shapes: weight is [out in]; the result has rank 2r.

    Reference: Büyükakyüz, OLoRA, 2024, arXiv 2406.01775, section 3.
    """
    w = weight.double()
    q, _ = torch.linalg.qr(w[:, : update.rank])
    return less(update, update.scale * q, q.T @ w)
