"""Training of alignment adapters and task adapters."""

from .align import train_align
from .joint import train_joint
from .task import train_task

__all__ = ["train_align", "train_joint", "train_task"]
