"""concatenate: the exact weighted sum, against entry-by-entry arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from adaptermix.algebra import LowRank, concatenate

from ..strategies import stacks
from .oracles import assert_untouched, size, snapshot, total

Stack = tuple[list[LowRank], list[float]]


@given(stacks())
def test_it_is_the_weighted_sum_in_float64(stack: Stack) -> None:
    updates, weights = stack
    error = (concatenate(updates, weights).dense() - total(updates, weights)).norm()
    assert error <= 1e-12 * size(updates, weights)


@given(stacks(dtype=torch.float32))
def test_it_is_the_weighted_sum_of_float32_factors(stack: Stack) -> None:
    updates, weights = stack
    merged = concatenate(updates, weights)
    assert merged.a.dtype == merged.b.dtype == torch.float32
    error = (merged.to(torch.float64).dense() - total(updates, weights)).norm()
    assert error <= 1e-6 * size(updates, weights)


@given(stacks(dtype=torch.bfloat16))
def test_half_precision_factors_are_summed_in_float32(stack: Stack) -> None:
    updates, weights = stack
    merged = concatenate(updates, weights)
    assert merged.a.dtype == merged.b.dtype == torch.float32
    error = (merged.to(torch.float64).dense() - total(updates, weights)).norm()
    assert error <= 1e-6 * size(updates, weights)


def test_float16_products_above_its_range_do_not_overflow() -> None:
    update = LowRank(b=torch.full((1, 1), 300.0).half(), a=torch.full((1, 1), 300.0).half(), scale=300.0)
    assert concatenate([update], [1.0]).dense().item() == pytest.approx(300.0**3, rel=1e-6)


@given(stacks())
def test_ranks_of_updates_with_a_weight_add_up(stack: Stack) -> None:
    updates, weights = stack
    kept = sum(update.rank for update, weight in zip(updates, weights, strict=True) if weight != 0)
    assert concatenate(updates, weights).rank == (kept or updates[0].rank)


@given(stacks())
def test_weights_of_zero_give_a_zero_update_of_the_right_shape(stack: Stack) -> None:
    updates, _ = stack
    merged = concatenate(updates, [0.0] * len(updates))
    assert merged.shape == updates[0].shape
    assert not merged.dense().any()


@given(stacks())
def test_inputs_are_untouched(stack: Stack) -> None:
    updates, weights = stack
    before = snapshot(updates)
    concatenate(updates, weights)
    assert_untouched(updates, before)


@given(stacks())
def test_opposite_weights_cancel(stack: Stack) -> None:
    updates, weights = stack
    merged = concatenate([*updates, *updates], [*weights, *(-weight for weight in weights)])
    assert merged.dense().norm() <= 1e-12 * size(updates, weights)


def test_dtypes_that_differ_give_the_widest() -> None:
    wide = LowRank(b=torch.ones(2, 1, dtype=torch.float64), a=torch.ones(1, 2, dtype=torch.float64))
    assert concatenate([wide.to(torch.float16), wide], [1.0, 1.0]).a.dtype == torch.float64
    assert concatenate([wide.to(torch.float16), wide.to(torch.bfloat16)], [1.0, 1.0]).a.dtype == torch.float32


def test_there_are_no_cross_terms() -> None:
    """0.5 * [1 0]^T [1 0] + 0.5 * [0 1]^T [0 1] is half the identity; averaging the factors gives all quarters."""
    first = LowRank(b=torch.tensor([[1.0], [0.0]]), a=torch.tensor([[1.0, 0.0]]))
    second = LowRank(b=torch.tensor([[0.0], [1.0]]), a=torch.tensor([[0.0, 1.0]]))
    assert concatenate([first, second], [0.5, 0.5]).dense().tolist() == [[0.5, 0.0], [0.0, 0.5]]


def test_no_update_is_refused() -> None:
    with pytest.raises(ValueError, match="updates of one shape are needed"):
        concatenate([], [])


def test_shapes_that_differ_are_refused_and_named() -> None:
    one, other = (LowRank(b=torch.ones(out, 1), a=torch.ones(1, 2)) for out in (2, 3))
    with pytest.raises(ValueError, match=r"one shape are needed, got \[\(2, 2\), \(3, 2\)\]"):
        concatenate([one, other], [1.0, 1.0])


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
def test_a_count_of_weights_that_does_not_match_is_refused(weights: list[float]) -> None:
    one = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"argument 2 is (shorter|longer)"):
        concatenate([one, one], weights)
