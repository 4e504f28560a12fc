"""Training losses, one file each."""

from .contrastive import contrastive_loss, retrieved
from .keeper import keeper_loss
from .linear_ce import linear_cross_entropy, plain_head
from .task_ce import answer_loss

__all__ = ["answer_loss", "contrastive_loss", "keeper_loss", "linear_cross_entropy", "plain_head", "retrieved"]
