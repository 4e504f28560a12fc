"""A weighted sum whose weights per place are learned, on a task or without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..algebra import Stack
from ..errors import InvalidValueError
from .base import LinearMethod, method


@method("fuse")
@dataclass(frozen=True, slots=True, kw_only=True)
class Fuse(LinearMethod):
    r"""Weighted sum with a gate per adapter and layer, learned on rows of the task.

    $\Delta_l = \sum_i g_{il} s_i B_i A_i$. The gates start at the weights and follow the gradient of the task's loss
    with Adam, its rate falling to zero; adapters, base and head do not change. Gates do not depend on the input, so
    the result is a plain adapter. With dev rows those gates are taken, of ten looks and the start, whose dev loss is
    least.

    Args:
        per: Unit that has separate gates: each layer, each module, or each adapter as a whole.
        steps: Steps of Adam.
        rate: Its learning rate at the start.
        batch: Rows per step.
        decay: Weight of the squared distance from the start, mean over gates, that is added to the loss.

    Shapes: k updates [out in] give one [out in].
    Differs from the paper: AdaMerging learns such coefficients by the entropy of answers to unlabelled test data; here
    they are learned by the task's loss on labelled rows, or without labels by the agreement of both sides of pairs with
    the first adapter alone, or by the entropy of answers to other texts than those of a test. AdapterFusion's weights
    depend on the input, so that it cannot be written as one adapter.
    Exact when: always.
    Reference: Yang et al., AdaMerging, ICLR 2024, arXiv 2310.02575; Pfeiffer et al., AdapterFusion, EACL 2021,
    arXiv 2005.00247.
    """

    learner: ClassVar[str] = "adaptermix.weight_search.gates:merge_with_gates"

    per: Literal["layer", "module", "adapter"] = "layer"
    steps: int = 100
    rate: float = 0.02
    batch: int = 16
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.rate <= 0 or self.decay < 0:
            raise InvalidValueError(
                "steps and decay must be at least 0, batch at least 1, and rate above 0", code="method.steps"
            )

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return the weights, which are the learned gates."""
        return stack.weights
