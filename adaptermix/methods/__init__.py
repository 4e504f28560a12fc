"""Named merge methods. Adding one is a file here, an import below and a row in `tests/methods/table.py`."""

from . import exact as _exact  # noqa: F401  (importing registers)
from .base import METHODS, MergeMethod, method

__all__ = ["METHODS", "MergeMethod", "method"]
