"""Looking into adapters and checkpoints: what is in them, and how they differ."""

from .compare_spectra import spectrum
from .inspect_adapters import inspect
from .inspect_report import Inspection
from .spectrum_report import SpectrumReport

__all__ = ["Inspection", "SpectrumReport", "inspect", "spectrum"]
