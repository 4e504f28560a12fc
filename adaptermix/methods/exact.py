"""The exact weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..algebra import Stack
from .base import LinearMethod, method


@method("exact")
@dataclass(frozen=True, slots=True, kw_only=True)
class Exact(LinearMethod):
    r"""Weighted sum of the deltas, with nothing approximated.

    $\Delta = \sum_i w_i s_i B_i A_i$, kept as concatenated factors of rank $\sum_i r_i$.

    Shapes: k updates [out in] give one [out in].
    Differs from the paper: the mid-align paper has a "weighted average" of two LoRAs without naming the operands;
    averaging the factors instead adds the cross terms $B_i A_j$, which belong to no adapter.
    Exact when: always.
    Reference: Liu and Niehues, Middle-Layer Representation Alignment, ACL 2025, arXiv 2502.14830, section 6.3.
    """

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return the weights."""
        return stack.weights
