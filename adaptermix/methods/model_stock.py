"""Model Stock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra import Stack, inner_products
from .base import LinearMethod, method


@method("model-stock")
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStock(LinearMethod):
    r"""Weighted sum of the deltas, drawn towards the base model the more they disagree.

    $\Delta = t \sum_i w_i \tau_i$ with $t = N c / (1 + (N - 1) c)$ and c the mean cosine between the N deltas, cut to
    [0, 1]; the cosines come from the factors, and the result stays low rank. A delta that is zero has no angle and
    does not count in N; one alone is multiplied by its weight.

    Shapes: k updates [out in] give one [out in].
    Differs from the paper: the paper has equal weights $w_i = 1/N$. Below c = 0, where its formula turns negative or
    divides by zero, t is 0.
    Exact when: there is one adapter, or all deltas are parallel.
    Reference: Jang, Yun and Han, Model Stock, ECCV 2024, arXiv 2403.19522, section 4.
    """

    depends_on_deltas: ClassVar[bool] = True

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return t times the weights."""
        gram = inner_products(stack.updates)
        lengths = gram.diagonal().clamp(min=0).sqrt()
        acts = [i for i, length in enumerate(lengths.tolist()) if length > 0]
        count = len(acts)
        if count < 2:
            return stack.weights
        pairs = [(i, j) for i in acts for j in acts if i < j]
        cosine = sum(float(gram[i, j] / (lengths[i] * lengths[j])) for i, j in pairs) / len(pairs)
        cosine = max(0.0, min(1.0, cosine))
        t = count * cosine / (1 + (count - 1) * cosine)
        return [t * weight for weight in stack.weights]
