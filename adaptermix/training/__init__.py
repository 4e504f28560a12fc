"""Training of alignment adapters and task adapters."""

from .fusion import train_fusion
from .joint import train_joint
from .least_squares import train_align
from .task import train_task

__all__ = ["train_align", "train_fusion", "train_joint", "train_task"]
