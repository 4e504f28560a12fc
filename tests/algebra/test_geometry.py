"""inner, norm, cosine and sign_conflict, against the dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from adaptermix.algebra import Dense, LowRank, cosine, inner, inner_products, norm, sign_conflict
from adaptermix.algebra.geometry import SAMPLE

from ..strategies import stacks, updates
from .oracles import assert_untouched, conflict, dense, size, snapshot

Stack = tuple[list[LowRank], list[float]]


@given(stacks(min_k=2, max_k=2))
def test_inner_is_the_sum_of_products_of_entries(stack: Stack) -> None:
    (x, y), _ = stack
    expected = float((dense(x) * dense(y)).sum())
    bound = size([x], [1.0]) * size([y], [1.0])
    assert inner(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-12 * bound)
    assert inner(x, y) == pytest.approx(inner(y, x), rel=1e-9, abs=1e-12 * bound)


@given(updates())
def test_norm_is_frobenius(update: LowRank) -> None:
    assert norm(update) == pytest.approx(float(dense(update).norm()), rel=1e-6, abs=1e-7 * size([update], [1.0]))


@given(updates())
def test_norm_scales_with_the_size_of_a_factor(update: LowRank) -> None:
    assert norm(update * -2.0) == pytest.approx(2 * norm(update), rel=1e-12)


@given(stacks(min_k=2, max_k=2))
def test_cosine_is_that_of_the_dense_matrices(stack: Stack) -> None:
    (x, y), _ = stack
    length = float(dense(x).norm() * dense(y).norm())
    if length > 1e-6 * size([x], [1.0]) * size([y], [1.0]):
        expected = float((dense(x) * dense(y)).sum()) / length
        assert cosine(x, y) == pytest.approx(expected, abs=1e-6)
        assert -1 - 1e-9 <= cosine(x, y) <= 1 + 1e-9


@given(updates())
def test_cosine_with_itself_is_one_and_with_its_negative_minus_one(update: LowRank) -> None:
    if norm(update) > 0:
        assert cosine(update, update * 3.0) == pytest.approx(1.0, abs=1e-9)
        assert cosine(update, update * -0.5) == pytest.approx(-1.0, abs=1e-9)


def test_cosine_with_a_zero_update_is_zero() -> None:
    one = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2))
    assert cosine(one, one * 0.0) == 0.0
    assert cosine(one * 0.0, one * 0.0) == 0.0


def test_half_precision_factors_are_multiplied_in_float64() -> None:
    update = LowRank(b=torch.full((2, 1), 300.0).half(), a=torch.full((1, 2), 300.0).half())
    assert norm(update) == pytest.approx(2 * 300.0**2, rel=1e-12)
    assert math.isfinite(inner(update, update))


def test_inner_of_shapes_that_differ_is_refused() -> None:
    one = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2))
    other = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"one shape are needed, got \(2, 2\) and \(2, 3\)"):
        inner(one, other)


@given(stacks(dtype=torch.float32))
def test_sign_conflict_of_a_small_module_is_exact(stack: Stack) -> None:
    updates, weights = stack
    weighted = [update * weight for update, weight in zip(updates, weights, strict=True)]
    assert sign_conflict(weighted) == pytest.approx(conflict(weighted), abs=1e-12)


def test_sign_conflict_at_the_sampling_limit_is_exact() -> None:
    generator, side = torch.Generator().manual_seed(5), math.isqrt(SAMPLE)
    pair = [
        LowRank(b=torch.randn(side, 2, generator=generator), a=torch.randn(2, side, generator=generator))
        for _ in range(2)
    ]
    one, other = (dense_matmul(update) for update in pair)
    assert sign_conflict(pair) == pytest.approx(float((one * other < 0).double().mean()), abs=1e-4)


def test_sign_conflict_of_a_large_module_is_close_to_the_dense_share() -> None:
    generator = torch.Generator().manual_seed(6)
    pair = [
        LowRank(b=torch.randn(300, 3, generator=generator), a=torch.randn(3, 300, generator=generator))
        for _ in range(2)
    ]
    one, other = (dense_matmul(update) for update in pair)
    share = sign_conflict(pair)
    assert 0.0 < share < 1.0
    assert share == pytest.approx(float((one * other < 0).double().mean()), abs=0.05)


ROWS = torch.arange(255)[:, None]
COLUMNS = torch.arange(300)[None, :]
PATTERNS = {
    "every other row": (ROWS % 2 == 0) & (COLUMNS >= 0),
    "every other column": (COLUMNS % 2 == 0) & (ROWS >= 0),
    "every third row": (ROWS % 3 == 0) & (COLUMNS >= 0),
    "a chess board": (ROWS + COLUMNS) % 2 == 0,
    "blocks of eight": (ROWS // 8 + COLUMNS // 8) % 2 == 0,
    "the lower third": (ROWS < 85) & (COLUMNS >= 0),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sign_conflict_does_not_alias_with_patterns_that_repeat(pattern: str) -> None:
    """An even grid of 128 rows sees every other row of 255 only: it said 1.0 or 0.0 where half the entries conflict."""
    conflicts = PATTERNS[pattern]
    one = Dense(w=torch.ones(255, 300))
    other = Dense(w=torch.where(conflicts, -1.0, 1.0))
    share = float(conflicts.double().mean())
    assert sign_conflict([one, other]) == pytest.approx(share, abs=0.015)
    assert sign_conflict([one, other], [0.5, -2.0]) == pytest.approx(1 - share, abs=0.015)
    assert sign_conflict([one, other], [0.5, 0.0]) == 0.0


def test_sign_conflict_of_factors_does_not_alias() -> None:
    signs = torch.where(ROWS % 2 == 0, -1.0, 1.0)
    pair = [LowRank(b=torch.ones(255, 1), a=torch.ones(1, 300)), LowRank(b=signs, a=torch.ones(1, 300), scale=0.5)]
    assert sign_conflict(pair) == pytest.approx(128 / 255, abs=0.015)


def test_an_inner_product_that_cancels_is_zero_not_rounding() -> None:
    generator = torch.Generator().manual_seed(7)
    b, a = torch.randn(40, 3, generator=generator), torch.randn(3, 30, generator=generator)
    nothing = LowRank(b=torch.cat([b, b / 3], dim=1), a=torch.cat([a, -3 * a]))
    assert norm(nothing) == 0.0
    close = LowRank(b=torch.cat([b, b], dim=1).double(), a=torch.cat([a, -(1 + 1e-6) * a.double()]))
    assert norm(close) == pytest.approx(1e-6 * float((b.double() @ a.double()).norm()), rel=1e-3)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_not_taken_for_rounding(value: float) -> None:
    one = LowRank(b=torch.tensor([[value], [1.0]]), a=torch.ones(1, 3))
    assert not math.isfinite(inner(one, one))
    assert not torch.isfinite(inner_products([one, one])).any()


def test_all_inner_products_are_those_of_the_pairs() -> None:
    generator = torch.Generator().manual_seed(8)
    updates = [
        LowRank(b=torch.randn(9, r, generator=generator), a=torch.randn(r, 7, generator=generator), scale=s)
        for r, s in ((1, 2.0), (3, -0.5), (2, 0.0), (4, 1.0))
    ]
    expected = [[float((x.dense().double() * y.dense().double()).sum()) for y in updates] for x in updates]
    assert inner_products(updates).tolist() == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in expected]


def dense_matmul(update: LowRank) -> torch.Tensor:
    return update.scale * (update.b.double() @ update.a.double())


@given(updates(dtype=torch.float32))
def test_an_update_conflicts_with_its_negative_wherever_it_is_not_zero(update: LowRank) -> None:
    alone, pair = sign_conflict([update]), sign_conflict([update, update * -2.0])
    assert alone == 0.0
    assert pair == pytest.approx(float((dense(update) != 0).double().mean()), abs=1e-12)
    assert sign_conflict([update, update]) == 0.0
    assert sign_conflict([update, update * 0.0]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sign_conflict_takes_every_dtype(dtype: torch.dtype) -> None:
    one = LowRank(b=torch.tensor([[1.0], [1.0]], dtype=dtype), a=torch.tensor([[1.0, 1.0]], dtype=dtype))
    other = LowRank(b=torch.tensor([[1.0], [-1.0]], dtype=dtype), a=torch.tensor([[1.0, 1.0]], dtype=dtype))
    assert sign_conflict([one, other]) == 0.5


def test_sign_conflict_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one update is needed"):
        sign_conflict([])


@given(stacks(min_k=2))
def test_inputs_are_untouched(stack: Stack) -> None:
    updates, _ = stack
    before = snapshot(updates)
    cosine(updates[0], updates[1])
    norm(updates[0])
    sign_conflict(updates)
    assert_untouched(updates, before)
