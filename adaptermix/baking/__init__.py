"""Merge adapters into their base model, in 16, 8 or 4 bits, and measure how much of their effect remains."""

from .report import BakedModule, BakeReport
from .stack import bake

__all__ = ["BakeReport", "BakedModule", "bake"]
