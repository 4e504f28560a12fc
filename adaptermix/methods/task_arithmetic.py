"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra import Stack
from .base import LinearMethod, method


@method("task-arithmetic")
@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArithmetic(LinearMethod):
    r"""Sum of task vectors times a factor.

    $\Delta = \lambda \sum_i w_i \tau_i$ with $\tau_i = s_i B_i A_i$. A weight of -1 negates a task (forgetting).

    Args:
        gain: $\lambda$; the paper tunes it on held-out data.

    Shapes: k updates [out in] give one [out in].
    Differs from the paper: a weight per adapter; the paper's own form has all weights 1.
    Exact when: always.
    Reference: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089, section 2.
    """

    factor: ClassVar[str | None] = "gain"

    gain: float = 1.0

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return gain times the weights."""
        return [self.gain * weight for weight in stack.weights]
