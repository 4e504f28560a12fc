"""Fisher-weighted averaging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..algebra import Dense, Stack
from ..algebra.operators import Average, Gain, Operator, chain
from ..errors import InvalidValueError
from .base import StackMethod, method


@method("fisher")
@dataclass(frozen=True, slots=True, kw_only=True)
class Fisher(StackMethod):
    r"""Mean of the deltas, each entry weighted by how much it matters to its task.

    $\Delta = \lambda \sum_i w_i F_i \odot \tau_i / \sum_i w_i F_i$ with $F_i$ the diagonal of the Fisher information
    (mean squared gradients of the loss) of adapter i; where all are zero, the plain weighted mean.

    Args:
        gain: $\lambda$, a factor on the result.

    Shapes: k updates [out in] with statistics [out in] give one dense [out in].
    Differs from the paper: deltas are averaged, not models, which is the same for one base model.
    Exact when: all F are equal; then it is the weighted mean (weights are divided by their sum).
    Reference: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv 2111.09832,
    section 3.
    """

    factor: ClassVar[str | None] = "gain"
    statistics: ClassVar[Literal["out in", "in in"] | None] = "out in"
    gain: float = 1.0

    def operators(self) -> Sequence[Operator]:
        """Return the chain."""
        return Average(), Gain(factor=self.gain)

    def __call__(self, stack: Stack) -> Dense:
        """Average.

        Raises:
            ValueError: a negative weight, or negative statistics.
        """
        if min(stack.weights) < 0 or any(bool((result < 0).any()) for result in stack.statistics):
            raise InvalidValueError(
                "fisher needs weights and statistics of at least 0, and one is negative", code="method.fisher-negative"
            )
        return chain(stack, self.operators())
