"""Training of alignment adapters and task adapters."""

from .align import train_align
from .task import train_task

__all__ = ["train_align", "train_task"]
