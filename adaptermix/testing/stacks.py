"""Tiny stacks to test a merge method with. Single rows, single columns and ranks above the sides are frequent."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..algebra import Dense, LowRank, Stack, Update

NAMES = ("task", "align", "style", "safety")
MODULE = "model.layers.3.self_attn.q_proj"


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return independent normal entries in float64."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def named(updates: list[Update], weights: list[float]) -> Stack:
    """Return a stack of one module whose adapters have names."""
    # Run-time type checkers look at items drawn with `random`, which Hypothesis forbids within a strategy.
    state = random.getstate()
    try:
        return Stack(
            updates=tuple(updates), weights=tuple(weights), names=NAMES[: len(updates)], module=MODULE, block=3, depth=8
        )
    finally:
        random.setstate(state)


def generic(
    shape: tuple[int, int],
    ranks: list[int],
    weights: list[float],
    *,
    seed: int,
    scales: tuple[float, ...] = (1.0, 0.5, -2.0, 3.25),
    acute: bool = False,
) -> Stack:
    """Return a stack of updates with normal factors in float64: entries differ and are not zero.

    Args:
        shape: Shape of every update.
        ranks: One per update.
        weights: One per update.
        seed: Seed of the entries.
        scales: At least one per update; further ones are ignored.
        acute: Whether all updates share a large part, so that the angles between them are clearly below 90 degrees; the
            absolute values of the scales are used then.
    """
    generator = torch.Generator().manual_seed(seed)
    common = normal(shape[0], 1, generator), normal(1, shape[1], generator)
    updates: list[Update] = []
    for rank, scale in zip(ranks, scales, strict=False):
        b, a = normal(shape[0], rank, generator), normal(rank, shape[1], generator)
        if acute:
            shrink = 0.3 * float(common[0].norm() * common[1].norm()) / float((b @ a).norm())
            b, a = torch.cat([common[0], shrink * b], dim=1), torch.cat([common[1], a])
        updates.append(LowRank(b=b, a=a, scale=abs(scale) if acute else scale))
    return named(updates, weights)


@st.composite
def generic_stacks(
    draw: st.DrawFn,
    *,
    min_k: int = 1,
    max_k: int = 4,
    max_side: int = 6,
    max_rank: int = 4,
    signed: bool = True,
    acute: bool = False,
) -> Stack:
    """Stacks with normal factors: methods that cut at a threshold or vote on signs meet no ties.

    Args:
        draw: Hypothesis passes this function.
        min_k: Fewest adapters.
        max_k: Most adapters, at most 4.
        max_side: Largest side of a matrix.
        max_rank: Largest rank; it may exceed the sides.
        signed: Whether weights may be zero or negative.
        acute: See `generic`.
    """
    k = draw(st.integers(min_k, max_k))
    sides = st.integers(1, max_side)
    weights = st.sampled_from([1.0, 0.9, 0.1, 3.0, *([-0.5, -1.0, 0.0] if signed else [])])
    return generic(
        (draw(sides), draw(sides)),
        draw(st.lists(st.integers(1, max_rank), min_size=k, max_size=k)),
        draw(st.lists(weights, min_size=k, max_size=k)),
        seed=draw(st.integers(0, 2**32 - 1)),
        scales=tuple(draw(st.permutations([1.0, 0.5, -2.0, 3.25]))),
        acute=acute,
    )


@st.composite
def messy_stacks(draw: st.DrawFn, *, max_k: int = 4, max_side: int = 6, max_rank: int = 4) -> Stack:
    """Stacks with difficult adapters: zeros, ties, multiples of one update, scales of zero, weights below zero."""
    k = draw(st.integers(1, max_k))
    out, into = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def factor(rows: int, columns: int) -> Tensor:
        whole = torch.randint(-1, 2, (rows, columns), generator=generator).double()
        values = normal(rows, columns, generator) if draw(st.booleans()) else whole
        return values * draw(st.sampled_from([1.0, 0.0, 1e-2, 32.0, 1e-12]))

    updates: list[Update] = []
    for _ in range(k):
        rank: int = draw(st.integers(1, max_rank))
        scale: float = draw(st.sampled_from([1.0, -1.0, 0.0, 0.5, 16.0]))
        fresh = LowRank(b=factor(out, rank), a=factor(rank, into), scale=scale)
        again: bool = draw(st.booleans())
        updates.append(updates[0] * scale if updates and again else fresh)
    weights = draw(st.lists(st.sampled_from([1.0, 0.0, -1.0, 0.1, 3.0]), min_size=k, max_size=k))
    return named(updates, weights)


def with_statistics(stack: Stack, kind: Literal["out in", "in in"] | None) -> Stack:
    """Return the stack with statistics of the kind that a method asks for: squares, or Gram matrices of inputs."""
    if kind is None:
        return stack
    generator = torch.Generator().manual_seed(11)
    out, into = stack.shape
    statistics = [
        normal(out, into, generator).square() + 0.1 if kind == "out in" else x.T @ x
        for x in (normal(2 * into + 3, into, generator) for _ in stack.updates)
    ]
    return replace(stack, statistics=tuple(statistics))


def rounding_scale(stack: Stack) -> float:
    """Return the sum of max(1, |w|) |s| |B| |A|, the scale of rounding errors even if the terms cancel."""
    total = 0.0
    for update, weight in zip(stack.updates, stack.weights, strict=True):
        if isinstance(update, Dense):
            size = float(update.w.double().norm())
        else:
            size = abs(update.scale) * float(update.b.double().norm() * update.a.double().norm())
        total += max(1.0, abs(weight)) * size
    return total
