"""Entry-wise operators on the dense updates of one module, and their composition.

A method is a chain of them: transforms keep the number of updates, a reduction makes one of all. They work on blocks of
rows, so that no more than the result is ever dense. A transform may need to look at whole updates first (`fit`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .draws import uniform
from .selection import Threshold, kept_count, threshold
from .stack import Stack
from .updates import Dense


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """A block of rows of a stack, from row `first`."""

    stack: Stack
    first: int

    def weights(self, like: Tensor) -> Float[Tensor, "k 1 1"]:
        """Return the weights, ready to be multiplied with a block."""
        return torch.tensor(self.stack.weights, dtype=like.dtype, device=like.device)[:, None, None]

    def uniform(self, number: int, shape: tuple[int, ...]) -> Float[Tensor, "rows in"]:
        """Return numbers in [0, 1) for one update's block; see `draws.uniform`.

        Raises:
            ValueError: the stack has no seed.
        """
        stack = self.stack
        if stack.seed is None:
            raise ValueError("a seed is needed for a random method, got none")
        start = self.first * stack.shape[1]
        return uniform(stack.seed, stack.names[number], stack.module, first=start, shape=shape, device=stack.device)


class Operator(ABC):
    """One step of a chain. Operators are values: `fit` returns a new one."""

    def fit(self, stack: Stack) -> Operator:  # noqa: ARG002
        """Return the operator fitted to whole updates, in their state at the start of the chain."""
        return self

    @abstractmethod
    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "j rows in"]:
        """Work on a block; `values` may be overwritten.

        Args:
            values: The same rows of every update.
            rows: The block.
        """


def chain(stack: Stack, operators: Sequence[Operator]) -> Dense:
    """Run operators over a stack; the last must be a reduction.

    Shapes: k updates of [out in] give one dense [out in], in the stack's working dtype.
    """
    fitted = [operator.fit(stack) for operator in operators]
    merged = torch.empty(stack.shape, dtype=stack.dtype, device=stack.device)
    for first, block in stack.blocks():
        rows = RowBlock(stack=stack, first=first)
        values = block
        for operator in fitted:
            values = operator(values, rows)
        merged[first : first + values.shape[1]] = values[0]
    return Dense(w=merged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim(Operator):
    r"""Keep the largest entries of each update by absolute value, and zero the rest. First in a chain.

    Args:
        density: Share kept, in (0, 1]; the count is rounded down, and at least one.
        skip: Share of the largest entries to zero as well (outliers), rounded down, and possibly none.
        kept: Thresholds per adapter, if they are known already (over the whole model); else found per module.
    """

    density: float
    skip: float = 0.0
    kept: dict[str, Threshold] = field(default_factory=dict)
    skipped: dict[str, Threshold] = field(default_factory=dict)

    def fit(self, stack: Stack) -> Trim:
        """Find the thresholds of every update."""
        if self.kept:
            return self
        size = stack.shape[0] * stack.shape[1]
        skip = int(self.skip * size)
        count = min(size, kept_count(self.density, size) + skip)
        numbered = list(enumerate(stack.names))
        kept = {} if count == size else {name: threshold(stack, i, count) for i, name in numbered}
        skipped = {name: threshold(stack, i, skip) for i, name in numbered} if skip else {}
        return replace(self, kept=kept, skipped=skipped)

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "k rows in"]:
        """Zero the entries under the threshold."""
        for number, name in enumerate(rows.stack.names):
            update = values[number]
            # Both masks look at the entries as they came.
            drop = self.skipped[name].keeps(update, rows.first) if name in self.skipped else None
            if name in self.kept:
                values[number] = self.kept[name].trim(update, rows.first)
            if drop is not None:
                update.masked_fill_(drop, 0.0)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop(Operator):
    r"""Zero each entry with probability 1 - density, and divide the rest by the density (DARE).

    Args:
        density: Probability of being kept, in (0, 1].
        rescale: "inverse" divides by the density, which keeps the expectation; "none" does not change the survivors.
    """

    density: float
    rescale: Literal["inverse", "none"] = "inverse"

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "k rows in"]:
        """Drop and rescale."""
        if self.density == 1:
            return values
        for number in range(len(values)):
            values[number] *= rows.uniform(number, tuple(values.shape[1:])) < self.density
        return values.div_(self.density) if self.rescale == "inverse" else values


@dataclass(frozen=True, slots=True, kw_only=True)
class DropByMagnitude(Operator):
    r"""Zero entries at random, small ones more often than large ones, row by row (DELLA's MagPrune).

    In each row of n entries the one of rank j by absolute value (0 the smallest) is kept with probability
    $p_j = density + epsilon (j / (n - 1) - 1/2)$ and then divided by it.

    Args:
        density: Mean probability of being kept.
        epsilon: Difference between the probabilities of the largest and the smallest; density +- epsilon/2 must lie in
            (0, 1].
    """

    density: float
    epsilon: float

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "k rows in"]:
        """Drop and rescale."""
        width = values.shape[2]
        steps = torch.linspace(-0.5, 0.5, width, dtype=torch.float64) if width > 1 else torch.zeros(1)
        # No smaller than the resolution of a draw: a chance of 0 would be divided by.
        chances = (self.density + self.epsilon * steps).clamp(min=2.0**-24).to(values)
        for number in range(len(values)):
            update = values[number]
            # stable, so that entries of one size keep their order on every device
            order = update.abs().sort(dim=1, stable=True).indices
            chance = torch.empty_like(update).scatter_(1, order, chances.expand_as(update))
            update *= rows.uniform(number, tuple(update.shape)) < chance
            update /= chance
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Weigh(Operator):
    """Multiply each update by its weight."""

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "k rows in"]:
        """Multiply."""
        return values.mul_(rows.weights(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Elect(Operator):
    """Zero, entry by entry, the updates whose sign is not that of the sum; a sum of zero counts as positive."""

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "k rows in"]:  # noqa: ARG002
        """Elect the sign."""
        # 1 where positive wins, else 0. Clamping to one side of zero is several times as fast as filling by a mask.
        positive, most = (values.sum(0) >= 0).to(values.dtype), torch.finfo(values.dtype).max
        return values.clamp_(min=(positive - 1) * most, max=positive * most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Total(Operator):
    """Sum of the updates."""

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "1 rows in"]:  # noqa: ARG002
        """Add up."""
        return values.sum(0, keepdim=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DisjointMean(Operator):
    r"""Mean, entry by entry, over the updates that are not zero there.

    Args:
        by: "count" gives $\sum_i w_i x_i / \#\{i : x_i \ne 0\}$ of updates not yet weighted (PEFT's TIES); "weight"
            gives $\sum_i x_i / \sum_{i : x_i \ne 0} w_i$ of updates already weighted (mergekit's).
    """

    by: Literal["count", "weight"]

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "1 rows in"]:
        """Divide the sum by the survivors."""
        total, share = torch.zeros_like(values[0]), torch.zeros_like(values[0])
        if self.by == "count":
            for update, weight in zip(values, rows.stack.weights, strict=True):
                # Not add_(alpha=...), which rounds once: the order of two adapters would show.
                total += update * weight
                share += update != 0
            return total.div_(share.clamp_(min=1))[None]
        size = torch.zeros_like(share)
        for update, weight in zip(values, rows.stack.weights, strict=True):
            total += update
            there = (update != 0).to(share)
            share += there * weight
            size += there * abs(weight)
        # Weights of either sign may cancel up to rounding.
        nothing = share.abs() <= 4 * torch.finfo(share.dtype).eps * size
        return total.div_(torch.where(nothing, 1.0, share))[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Average(Operator):
    r"""Mean with a weight per entry, $\sum_i w_i F_i x_i / \sum_i w_i F_i$, the $F_i$ from the stack's statistics."""

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "1 rows in"]:
        """Average; where all F are zero, the plain weighted mean."""
        part = slice(rows.first, rows.first + values.shape[1])
        importance = torch.stack([tensor[part].to(values) for tensor in rows.stack.statistics])
        weights = rows.weights(values)
        flat = (importance * weights).sum(0, keepdim=True) == 0
        importance = torch.where(flat, 1.0, importance) * weights
        share = importance.sum(0, keepdim=True)
        return (importance * values).sum(0, keepdim=True) / torch.where(share == 0, 1.0, share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain(Operator):
    r"""Multiply by a factor ($\lambda$ in the papers)."""

    factor: float

    def __call__(self, values: Float[Tensor, "k rows in"], rows: RowBlock) -> Float[Tensor, "k rows in"]:  # noqa: ARG002
        """Multiply."""
        return values if self.factor == 1 else values.mul_(self.factor)
