"""Keep states close to those of the base."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def keeper_loss(states: Float[Tensor, "tokens d"], base: Float[Tensor, "tokens d"]) -> Float[Tensor, ""]:
    r"""Return how far states have moved, as a share of the squared length that the base's have.

    With the adapted states $h_t$ and the base's $h^0_t$ of the same $n$ tokens, in float32,

        $L = \frac{1}{n} \sum_t |h_t - h^0_t|^2 / |h^0_t|^2$

    Every token counts the same, regardless of its length: the first token of many models is a hundred times longer than
    the others, and would dominate a share of the sum of squares. 0 if no state moved, 1 if all states are zero.

    Args:
        states: States of the model in training.
        base: States of the frozen base; no gradient reaches them.

    Shapes: both [tokens d]; returns a scalar.
    Relations: an anchor, while `contrastive_loss` pulls: translations move to states that stay the same.
    """
    base = base.detach().float()
    lengths = base.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((states.float() - base).square().sum(-1) / lengths).sum() / max(1, len(base))
