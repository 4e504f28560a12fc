"""The weighted sum, cut to the rank of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra import Stack
from .base import LinearMethod, method


@method("svd")
@dataclass(frozen=True, slots=True, kw_only=True)
class Svd(LinearMethod):
    r"""Weighted sum of the deltas, approximated at the largest rank of the inputs.

    $\Delta = [\sum_i w_i s_i B_i A_i]_r$ with r the requested rank, by default $\max_i r_i$: what peft calls `svd`,
    from thin QRs and a small SVD instead of the dense matrix.

    Shapes: k updates [out in] give one [out in] of rank r.
    Differs from `exact`: only in the default rank.
    Exact when: the sum has rank r.
    Reference: Eckart and Young, Psychometrika 1936; peft, `add_weighted_adapter`.
    """

    cuts_to_largest_rank: ClassVar[bool] = True

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return the weights."""
        return stack.weights
