"""One row per merge method: how to make it, and which laws hold beyond the universal ones.

A new method is entered here once; `test_laws.py` then holds it to everything, and fails if it is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adaptermix.methods import MergeMethod
from adaptermix.methods.exact import Exact

LINEAR = "linear"
"""The result is the weighted sum of the deltas, whatever the weights."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method and its laws."""

    make: Callable[[], MergeMethod]
    laws: frozenset[str] = frozenset()


TABLE: dict[str, Row] = {
    "exact": Row(make=Exact, laws=frozenset({LINEAR})),
}
