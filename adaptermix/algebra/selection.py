"""The k-th largest of many entries that are never in memory together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .stack import Stack
from .updates import Dense

_SAMPLE = 256
_MARGIN = 0.03


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Threshold:
    """Threshold that keeps a requested number of entries.

    Args:
        value: The smallest absolute value that is kept.
        ties: How many of the entries equal to it are kept, the first in row order; None for all.
        before: Number of entries equal to it before each block, by the block's first row.
    """

    value: float
    ties: int | None
    before: dict[int, int]

    def keeps(self, values: Float[Tensor, "rows in"], first: int) -> Tensor:
        """Return which entries of a block are kept."""
        size = values.abs()
        if self.value == 0 or self.ties is None:
            return size >= self.value
        kept = size > self.value
        left = self.ties - self.before.get(first, 0)
        if left > 0:
            equal = size == self.value
            count = int(torch.count_nonzero(equal))
            kept |= equal if count <= left else equal & (equal.flatten().cumsum(0).reshape(equal.shape) <= left)
        return kept

    def trim(self, values: Float[Tensor, "rows in"], first: int) -> Tensor:
        """Return a block with the entries that are not kept at zero."""
        if self.ties is None and self.value > 0:
            # One pass: zeros are the entries with |x| <= the next smaller number.
            below = torch.nextafter(values.new_tensor(self.value), values.new_zeros(()))
            return torch.nn.functional.hardshrink(values, float(below))
        return values.masked_fill(~self.keeps(values, first), 0.0)


Pieces = Callable[[], Iterator[tuple[int, Tensor]]]
"""Returns a new iterator over the absolute values at each call: (first row, values)."""


def kept_count(density: float, size: int) -> int:
    """Return how many of `size` entries a density keeps: rounded down, as PEFT and mergekit do, and at least one."""
    return min(size, max(1, int(density * size)))


def grid(stack: Stack, index: int) -> Float[Tensor, " n"]:
    """Return the absolute values of one update on an even grid of at most 256 x 256 entries."""
    out, into = stack.shape
    rows, columns = (torch.linspace(0, n - 1, min(n, _SAMPLE)).round().long().to(stack.device) for n in (out, into))
    update = stack.updates[index].to(stack.dtype)
    if isinstance(update, Dense):
        return update.w[rows][:, columns].abs().flatten()
    return ((update.b[rows] * update.scale) @ update.a[:, columns]).abs().flatten()


def bracket(samples: Sequence[tuple[Float[Tensor, " _"], int]], density: float) -> tuple[float, float]:
    """Return bounds that probably enclose the smallest kept value, judged by samples.

    Args:
        samples: Per matrix some of its absolute values, and how many entries it has.
        density: Share of all entries to keep.
    """
    sizes = torch.cat([result for result, _ in samples])
    mass = torch.cat([torch.full_like(result, size / len(result), dtype=torch.float64) for result, size in samples])
    order = sizes.argsort(descending=True)
    share = mass[order].cumsum(0) / mass.sum()
    # Rounding may leave the last share just below 1.
    last = len(share) - 1
    # The sampling error falls with the root of the sample, so that little is collected of a whole model.
    margin = max(0.002, _MARGIN * _SAMPLE / math.sqrt(len(sizes)))
    low = min(last, int(torch.searchsorted(share, min(density + margin, 1.0))))
    high = min(last, int(torch.searchsorted(share, max(density - margin, 0.0))))
    return (
        float(sizes[order[low]]) if density + margin < 1 else 0.0,
        float(sizes[order[high]]) if density - margin > 0 else math.inf,
    )


def kth_largest(pieces: Pieces, count: int, bounds: tuple[float, float]) -> Threshold:
    """Return the threshold that keeps exactly `count` entries, in one pass if the bounds hold and two if not.

    Args:
        pieces: The absolute values, block by block.
        count: Entries to keep, at least 1.
        bounds: Bounds that probably enclose the threshold; entries above are only counted, those between are collected.

    Raises:
        ValueError: an entry is NaN.
    """
    low, high = bounds
    above, inside = 0, []
    for first, values in pieces():
        above += int(torch.count_nonzero(values > high))
        inside.append((first, values[(values >= low) & (values <= high)]))
    between = torch.cat([result for _, result in inside])
    need = count - above
    if not 0 < need <= len(between):
        if bounds == (0.0, math.inf):
            raise ValueError("finite updates are needed to find their largest entries, and one is NaN")
        return kth_largest(pieces, count, (0.0, math.inf))
    value = float(between.kthvalue(len(between) - need + 1).values)
    ties, before, seen = need - int((between > value).sum()), {}, 0
    for first, result in inside:
        before[first] = seen
        seen += int(torch.count_nonzero(result == value))
    return Threshold(value=value, ties=None if ties == seen else ties, before=before)


def _pieces(stack: Stack, index: int) -> Iterator[tuple[int, Tensor]]:
    # In the dtype of the whole stack, which the threshold will be compared in.
    alone = Stack(updates=(stack.updates[index].to(stack.dtype),), weights=(1.0,))
    return ((first, block[0].abs_()) for first, block in alone.blocks())


def _size(stack: Stack) -> int:
    return stack.shape[0] * stack.shape[1]


def threshold(stack: Stack, index: int, count: int) -> Threshold:
    """Return the threshold that keeps a number of the largest entries of one update of a stack."""
    size = _size(stack)
    small = size <= _SAMPLE**2
    bounds = (0.0, math.inf) if small else bracket([(grid(stack, index), size)], count / size)
    return kth_largest(lambda: _pieces(stack, index), count, bounds)


def model_threshold(stacks: Callable[[], Iterable[Stack]], name: str, density: float) -> Threshold:
    """Return the threshold that keeps a share of the largest entries of one adapter over all its modules.

    Entries equal to it are all kept, in every module.

    Args:
        stacks: Returns a new iterator over all stacks at each call.
        name: The adapter.
        density: Share of its entries to keep.
    """
    samples = [(grid(s, s.names.index(name)), _size(s)) for s in stacks() if name in s.names]

    def pieces() -> Iterator[tuple[int, Tensor]]:
        for stack in stacks():
            if name in stack.names:
                yield from _pieces(stack, stack.names.index(name))

    count = kept_count(density, sum(size for _, size in samples))
    return Threshold(value=kth_largest(pieces, count, bracket(samples, density)).value, ties=None, before={})
