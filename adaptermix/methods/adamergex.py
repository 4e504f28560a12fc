"""AdaMergeX: a task adapter moved by the difference of a reference task between two languages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra import Stack
from .base import LinearMethod, method


@method("adamergex")
@dataclass(frozen=True, slots=True, kw_only=True)
class AdaMergeX(LinearMethod):
    r"""Move a task adapter from its language to another by the difference of two adapters of a reference task.

    Of three adapters, in this order: the task in the source language, a reference task (language modelling, say) in the
    target language, and the same reference task in the source language:

        $\Delta = w_1 \tau_{task} + t (w_2 \tau_{target} - w_3 \tau_{source})$.

    Give all three weight 1 and let a search find t: `search task target source --method adamergex --space free --grid 1
    --vary t=0.25,0.5,1,2`, or `--bounds 1,1 --trials 20 --vary t=0.0:2.0`.

    Args:
        t: $t$, how far to move; 0 does not change the task adapter.

    Shapes: three updates [out in] give one [out in].
    Differs from the paper: the paper adds the factors of LoRAs, $A_{task} + t (A_{target} - A_{source})$ and B
    likewise, which needs one rank and multiplies factors of different adapters with each other; here the deltas are
    added, which holds for any ranks. Its other form, a product of the entries of (IA)3 vectors, is not for LoRAs.
    Exact when: always.
    Reference: Zhao et al., AdaMergeX, NAACL 2025, arXiv 2402.18913, section 3.
    """

    roles: ClassVar[tuple[str, ...]] = (
        "the task in the source language",
        "the reference task in the target language",
        "the reference task in the source language",
    )

    t: float = 1.0

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return the weights times 1, t and -t."""
        signs = (1.0, self.t, 0.0 - self.t)
        return [weight * signs[index] for index, weight in zip(stack.indices, stack.weights, strict=True)]
