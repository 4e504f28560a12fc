"""Reports about adapters and checkpoints: their content, and their differences."""

from .compare_spectra import spectrum
from .inspect_adapters import inspect
from .inspect_report import Inspection
from .spectrum_report import SpectrumReport

__all__ = ["Inspection", "SpectrumReport", "inspect", "spectrum"]
