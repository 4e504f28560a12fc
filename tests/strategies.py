"""Hypothesis strategies: tiny updates, whose edge shapes (one row, one column, rank above the sides) come up often."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from adaptermix.algebra import LowRank

SCALES = st.sampled_from([1.0, -1.0, 0.0, 0.5, 2.0, -3.25, 16.0, 1e-3])
WEIGHTS = st.sampled_from([1.0, 0.0, -1.0, 0.9, 0.1, -0.5, 3.0])


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal entries, or small whole numbers with many zeros, at one of a few magnitudes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    else:
        values = torch.randint(-1, 2, (rows, columns), generator=generator).double()
    return (values * draw(st.sampled_from([1.0, 1.0, 1e-2, 32.0]))).to(dtype)


@st.composite
def updates(
    draw: st.DrawFn,
    *,
    shape: tuple[int, int] | None = None,
    max_side: int = 6,
    max_rank: int = 4,
    dtype: torch.dtype = torch.float64,
) -> LowRank:
    """One update, of the given shape or of any up to `max_side`."""
    sides = st.integers(1, max_side)
    out, into = shape or (draw(sides), draw(sides))
    rank = draw(st.integers(1, max_rank))
    return LowRank(b=draw(matrices(out, rank, dtype)), a=draw(matrices(rank, into, dtype)), scale=draw(SCALES))


@st.composite
def stacks(
    draw: st.DrawFn,
    *,
    min_k: int = 1,
    max_k: int = 4,
    max_side: int = 6,
    max_rank: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[LowRank], list[float]]:
    """Updates of one module and a weight for each."""
    sides = st.integers(1, max_side)
    shape = draw(sides), draw(sides)
    k = draw(st.integers(min_k, max_k))
    stack = [draw(updates(shape=shape, max_rank=max_rank, dtype=dtype)) for _ in range(k)]
    return stack, [draw(WEIGHTS) for _ in range(k)]
