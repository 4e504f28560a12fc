"""Full checkpoints: merged, written with deltas added, and turned into adapters, one tensor in memory at a time."""

from .extracting import extract
from .merging import merge_checkpoints
from .report import ExtractReport
from .writing import write_checkpoint

__all__ = ["ExtractReport", "extract", "merge_checkpoints", "write_checkpoint"]
