r"""Tests that any merge method and any task can inherit, also in other packages.

Example, in a test file:

    class TestMine(MergeMethodLaws):
        method = Mine(density=0.3)
        neutral = Mine(density=1.0)

    class TestMyTask(TaskLaws):
        task = MyTask()
        data = {"de.csv": "text,label\nrot,a\nblau,b\ngelb,a\n"}
"""

try:
    import hypothesis
    import pytest
except ImportError as error:
    raise ImportError("adaptermix.testing needs pytest and hypothesis: pip install 'adaptermix[testing]'.") from error

from .laws import MergeMethodLaws
from .stacks import generic_stacks, messy_stacks, rounding_scale, with_statistics
from .task_laws import TaskLaws

__all__ = ["MergeMethodLaws", "TaskLaws", "generic_stacks", "messy_stacks", "rounding_scale", "with_statistics"]

del hypothesis, pytest
