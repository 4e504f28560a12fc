"""Adapters written into their base model, in 16, 8 or 4 bits, and what is left of them there."""

from .report import BakedModule, BakeReport
from .run import bake

__all__ = ["BakeReport", "BakedModule", "bake"]
