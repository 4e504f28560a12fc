"""Bring the states of a sentence to those that the frozen base has of its translation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_SPREAD = 0.01
"""Smallest spread that counts, as a share of the root mean square of all spreads."""


def spread_of(targets: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Return the standard deviation of every dimension over sentences, at least 1 % of the root mean square of all.

    The root mean square is over mean and edge token together. In the middle of all-MiniLM-L6-v2 the first token's
    deviations are 0.4 % of those of the mean, so that the lower bound decides for nearly all of its dimensions; of
    multilingual-e5-small's for one in six, and for none of SmolLM2 135M's and Gemma 3 270M's.

    Args:
        targets: Vectors of the frozen base.

    Shapes: targets [n d]; returns [d], ones where no dimension varies.
    """
    wide = targets.double()
    return bounded((wide - wide.mean(0)).square().mean(0).sqrt()).to(targets.dtype)


def bounded(spread: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return spreads that are at least 1 % of the root mean square of all; ones where no dimension varies.

    Some models have dimensions that do not vary at all but for rounding (all-MiniLM-L6-v2 one in its last block).
    """
    least = LEAST_SPREAD * spread.square().mean().sqrt()
    return spread.clamp_min(least) if least > 0 else torch.ones_like(spread)


def distil_loss(
    states: Float[Tensor, "n d"], targets: Float[Tensor, "n d"], spread: Float[Tensor, " d"]
) -> Float[Tensor, ""]:
    r"""Return the mean squared distance of sentence vectors from their targets, in spreads, in float32.

        $L = \frac{1}{n d} \sum_{ij} ((h_{ij} - t_{ij}) / s_j)^2$

    With mean and edge token side by side, each is half of it. A few dimensions of language models are hundreds of times
    longer than the others; measured in their spread all count the same. Predicting the mean of all targets for every
    sentence gives about 1, or less where the lower bound of the spread decides.

    Args:
        states: Vectors of the model in training.
        targets: Vectors that the frozen base has of the translations; no gradient reaches them.
        spread: Unit of distance in each dimension, see `spread_of`.

    Shapes: states and targets [n d], spread [d]; returns a scalar.
    Relations: `contrastive_loss` moves both sides to wherever pairs differ; here the other languages move to the
    base's states of English, which a task adapter was trained on.
    """
    with torch.autocast(states.device.type, enabled=False):
        loss: Tensor = ((states.float() - targets.detach().float()) / spread.float()).square().mean()
    return loss
