"""Training of alignment adapters and task adapters."""

from .align import train_align
from .fusion import train_fusion
from .joint import train_joint
from .task import train_task

__all__ = ["train_align", "train_fusion", "train_joint", "train_task"]
