"""Spherical linear interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra import Stack, inner_products
from ..errors import InvalidValueError
from .base import LinearMethod, method

_PARALLEL = 0.9995


@method("slerp")
@dataclass(frozen=True, slots=True, kw_only=True)
class Slerp(LinearMethod):
    r"""Interpolate two deltas along the arc between them.

    $\Delta = W [\sin((1-t)\theta) \tau_1 + \sin(t\theta) \tau_2] / \sin\theta$ with $W = w_1 + w_2$, $t = w_2 / W$ and
    $\theta$ the angle between the deltas, which comes from the factors; the result stays low rank. Where the deltas are
    almost parallel (|cos| above 0.9995), or one is zero and there is no angle, it is the straight line: each times its
    weight.

    Shapes: one or two updates [out in] give one [out in]; a single one is multiplied by its weight.
    Differs from the paper: the deltas are interpolated, not the weights of the models; they keep their lengths, so a
    long one pulls more.
    Exact when: t is 0 or 1.
    Reference: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985, section 3.3.
    """

    depends_on_deltas: ClassVar[bool] = True

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return the two coefficients.

        Raises:
            ValueError: more than two updates, or a negative weight.
        """
        if len(stack.updates) == 1:
            return stack.weights
        if len(stack.updates) > 2:
            raise InvalidValueError(
                f"slerp takes two adapters, got {len(stack.updates)}; karcher takes more", code="method.two-adapters"
            )
        if min(stack.weights) < 0:
            raise InvalidValueError(
                f"slerp needs weights of at least 0, got {list(stack.weights)}", code="method.negative-weight"
            )
        total = sum(stack.weights)
        gram = inner_products(stack.updates)
        # Where factors cancel, rounding may leave a square below 0.
        size = math.sqrt(max(0.0, float(gram[0, 0]))) * math.sqrt(max(0.0, float(gram[1, 1])))
        if total == 0 or size == 0:
            return stack.weights
        cosine = max(-1.0, min(1.0, float(gram[0, 1]) / size))
        if abs(cosine) > _PARALLEL:
            return stack.weights
        t, angle = stack.weights[1] / total, math.acos(cosine)
        return [total * math.sin(part * angle) / math.sin(angle) for part in (1 - t, t)]
