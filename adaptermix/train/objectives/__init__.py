"""Training losses, one file each."""

from .contrastive import contrastive_loss
from .task_ce import answer_loss

__all__ = ["answer_loss", "contrastive_loss"]
