"""Losses of a stack: the distance of its states from those of a model that reads the text itself."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def state_loss(states: Float[Tensor, "n d"], targets: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the mean squared difference of states and their targets, in float32.

    Args:
        states: States of the stack.
        targets: States of the teacher; no gradient reaches them.

    Shapes: states and targets [n d]; returns a scalar.
    Reference: Schmidt et al., Findings of EMNLP 2024, arXiv 2406.12739, section 3.1.
    """
    with torch.autocast(states.device.type, enabled=False):
        loss: Tensor = (states.float() - targets.detach().float()).square().mean()
    return loss


def unexplained(states: Float[Tensor, "n d"], targets: Float[Tensor, "n d"]) -> float:
    r"""Return the fraction of the targets' variance that the states do not explain.

        $\sum_i \|s_i - t_i\|^2 / \sum_i \|t_i - \bar t\|^2$

    The mean is that of all rows at once, so the value does not depend on batches. 0 for the targets themselves, 1
    for their mean, more for states that are further away.

    Args:
        states: States of the stack on all rows.
        targets: States of the teacher on all rows.

    Shapes: states and targets [n d].
    """
    wide = targets.double()
    around = float((wide - wide.mean(0)).square().sum())
    return float((states.double() - wide).square().sum()) / (around or 1.0)
