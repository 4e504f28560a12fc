"""Leave states where the base has them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def keeper_loss(states: Float[Tensor, "tokens d"], base: Float[Tensor, "tokens d"]) -> Float[Tensor, ""]:
    r"""Return how far states have moved, as a share of the squared length that the base's have.

    With the adapted states $h_t$ and the base's $h^0_t$ of the same tokens, in float32,

        $L = \frac{\sum_t |h_t - h^0_t|^2}{\sum_t |h^0_t|^2}$

    which is the mean squared distance over the mean squared norm; every token of the batch counts the same, whatever
    its sentence. 0 where nothing moved, 1 where the states are zero.

    Args:
        states: States of the model in training.
        base: States of the frozen base; no gradient reaches them.

    Shapes: both [tokens d]; returns a scalar.
    Relations: an anchor, where `contrastive_loss` is a pull: translations come to states that stay where they are. The
    first token of some models is hundreds of times longer than the others and then makes up most of the denominator:
    leave it out of states and mean (`exclude_bos`).
    """
    base = base.detach().float()
    return (states.float() - base).square().sum() / base.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
