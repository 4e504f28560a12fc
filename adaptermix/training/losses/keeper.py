"""Leave states where the base has them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def keeper_loss(states: Float[Tensor, "tokens d"], base: Float[Tensor, "tokens d"]) -> Float[Tensor, ""]:
    r"""Return how far states have moved, as a share of the squared length that the base's have.

    With the adapted states $h_t$ and the base's $h^0_t$ of the same $n$ tokens, in float32,

        $L = \frac{1}{n} \sum_t |h_t - h^0_t|^2 / |h^0_t|^2$

    Every token counts the same, whatever its sentence and its length: the first token of many models is a hundred times
    longer than the others, and a share of the sum of squares would be its alone. 0 where nothing moved, 1 where the
    states are zero.

    Args:
        states: States of the model in training.
        base: States of the frozen base; no gradient reaches them.

    Shapes: both [tokens d]; returns a scalar.
    Relations: an anchor, where `contrastive_loss` is a pull: translations come to states that stay where they are.
    """
    base = base.detach().float()
    lengths = base.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((states.float() - base).square().sum(-1) / lengths).sum() / max(1, len(base))
