"""Training losses, one file each."""

from .contrastive import contrastive_loss, retrieved
from .distil import bounded, distil_loss, spread_of
from .keeper import keeper_loss
from .linear_ce import linear_cross_entropy, plain_head
from .task_ce import answer_loss

__all__ = [
    "answer_loss",
    "bounded",
    "contrastive_loss",
    "distil_loss",
    "keeper_loss",
    "linear_cross_entropy",
    "plain_head",
    "retrieved",
    "spread_of",
]
