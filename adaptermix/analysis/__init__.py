"""Looking into adapters and checkpoints: what is in them, and how they differ."""

from .inspecting import inspect
from .inspection import Inspection
from .scaling import SpectrumReport
from .spectra import spectrum

__all__ = ["Inspection", "SpectrumReport", "inspect", "spectrum"]
