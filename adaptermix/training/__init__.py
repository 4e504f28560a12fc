"""Training of alignment adapters and task adapters."""

from .callbacks import Callbacks
from .runner import Objective, Run, run_training

__all__ = ["Callbacks", "Objective", "Run", "run_training"]
