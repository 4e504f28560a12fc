"""Tests that any merge method can inherit, another package's too.

Example, in a test file:

    class TestMine(MergeMethodLaws):
        method = Mine(density=0.3)
        neutral = Mine(density=1.0)
"""

try:
    import hypothesis
    import pytest
except ImportError as error:
    raise ImportError("adaptermix.testing needs pytest and hypothesis: pip install 'adaptermix[testing]'.") from error

from .laws import MergeMethodLaws
from .stacks import generic_stacks, messy_stacks, rounding_scale, with_statistics

__all__ = ["MergeMethodLaws", "generic_stacks", "messy_stacks", "rounding_scale", "with_statistics"]

del hypothesis, pytest
