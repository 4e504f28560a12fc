"""Trimming keeps exactly the count that it promises, whatever the matrix and the blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaptermix.algebra import Dense, LowRank, Stack
from adaptermix.algebra import stack as stack_module
from adaptermix.algebra.operators import Total, Trim, chain
from adaptermix.algebra.selection import bracket, kept_count, kth_largest, model_threshold, threshold


def trimmed(w: Tensor, density: float, skip: float = 0.0) -> Tensor:
    return chain(Stack.of([Dense(w=w)]), [Trim(density=density, skip=skip), Total()]).w


def first_largest(w: Tensor, count: int) -> Tensor:
    """The `count` largest by size, the first in row order among equals."""
    flat = w.flatten()
    order = flat.abs().sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(flat).scatter(0, order, flat[order]).reshape(w.shape)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    density=st.one_of(st.floats(1e-9, 1.0), st.sampled_from([0.29, 0.5, 1.0])),
    block=st.sampled_from([1, 7, 2**20]),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["normal", "ties", "mostly zero"]),
)
def test_exactly_the_count_rounded_down_is_kept_the_first_in_row_order_among_ties(
    rows: int, columns: int, density: float, block: int, seed: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    if kind == "ties":
        w = torch.randint(1, 3, (rows, columns), generator=generator) * w.sign()
    if kind == "mostly zero":
        w = w * (torch.rand(rows, columns, generator=generator) < 0.2)
    count = max(1, int(density * (rows * columns)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_module, "BLOCK", block)
        found = trimmed(w, density)
    assert torch.equal(found, first_largest(w, count))
    if kind != "mostly zero":
        assert int((found != 0).sum()) == count


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 0.97, 0.99999])
@pytest.mark.parametrize("kind", ["normal", "ties", "mostly zero", "a few huge rows", "off the grid"])
@pytest.mark.parametrize("block", [2**20, 5000])
def test_large_matrices_judged_by_a_sample_are_still_exact(
    density: float, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last kinds the sampled rows and columns mislead: nearly everything large lies between them."""
    monkeypatch.setattr(stack_module, "BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(600, 520, generator=generator)
    if kind == "ties":
        w = (w * 2).round().clamp(-3, 3)
    if kind == "mostly zero":
        w = w * (torch.rand(w.shape, generator=generator) < 0.05)
    if kind == "a few huge rows":
        w[100:120] *= 1e4
    if kind == "off the grid":
        on = torch.linspace(0, 599, 256).round().long()
        w[[row for row in range(600) if row not in on.tolist()]] *= 100
    assert torch.equal(trimmed(w, density), first_largest(w, kept_count(density, w.numel())))


def test_a_sample_that_misleads_is_found_out() -> None:
    w = torch.arange(1.0, 10001.0).reshape(100, 100)
    found = kth_largest(lambda: iter([(0, w)]), 10, (1.0, 2.0))
    assert (found.value, found.ties) == (9991.0, None)
    found = kth_largest(lambda: iter([(0, w)]), 10, (9995.0, math.inf))
    assert (found.value, found.ties) == (9991.0, None)


def test_nan_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="finite updates are needed"):
        trimmed(torch.full((3, 3), math.nan), 0.5)


def test_a_threshold_is_found_in_the_dtype_of_the_whole_stack() -> None:
    """A float32 adapter beside a float64 one: its products are rounded otherwise in float32."""
    generator = torch.Generator().manual_seed(0)
    narrow = LowRank(b=torch.randn(20, 3, generator=generator), a=torch.randn(3, 20, generator=generator))
    wide = Dense(w=torch.zeros(20, 20, dtype=torch.float64))
    found = chain(Stack.of([narrow, wide], [1.0, 1.0]), [Trim(density=0.25), Total()]).w
    assert int((found != 0).sum()) == 100
    assert torch.equal(found, first_largest(narrow.to(torch.float64).dense(), 100))


def test_outliers_and_what_follows_are_counted_apart() -> None:
    w = torch.arange(1.0, 101.0).reshape(10, 10)
    found = trimmed(w, 0.2, 0.05)
    assert found[found != 0].tolist() == list(map(float, range(76, 96)))
    assert not trimmed(torch.ones(1, 2), 1.0, 0.9).all()


@pytest.mark.parametrize("density", [0.3, 0.99, 1 / 49, 0.02])
@pytest.mark.parametrize("shape", [(1, 32), (7, 7), (5, 20)])
def test_as_many_entries_are_kept_as_peft_and_mergekit_keep(shape: tuple[int, int], density: float) -> None:
    """A norm of 32 entries at density 0.3: 9, not 10."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    count = max(1, int(density * w.numel()))
    assert int((trimmed(w, density) != 0).sum()) == count
    assert count != 10


def test_the_bounds_hold_the_threshold_of_a_matrix_like_its_sample() -> None:
    values = torch.arange(1000.0)
    low, high = bracket([(values, 1000)], 0.5)
    assert low < 500 < high
    assert bracket([(values, 1000)], 1.0)[0] == 0.0
    assert bracket([(values, 1000)], 0.01)[1] == math.inf


@pytest.mark.parametrize("density", [0.05, 0.5, 0.999])
def test_over_the_model_as_many_are_kept_as_of_one_long_vector(density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    matrices = [size * torch.randn(300, 280, generator=generator) for size in (1.0, 0.01, 20.0)]
    stacks = [Stack.of([Dense(w=w)]) for w in matrices]
    found = model_threshold(lambda: stacks, "0", density)
    whole = torch.cat([w.flatten().abs() for w in matrices])
    assert int((whole >= found.value).sum()) == kept_count(density, whole.numel())


def test_ties_of_a_threshold_are_split_in_row_order() -> None:
    stack = Stack.of([Dense(w=torch.ones(4, 4))])
    found = threshold(stack, 0, 5)
    assert (found.value, found.ties) == (1.0, 5)
    assert found.keeps(torch.ones(4, 4), 0).flatten().tolist() == [True] * 5 + [False] * 11
