"""What every merge method must satisfy; inherit `MergeLaws` and give a `row` fixture to be held to it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.algebra import LowRank

from ..algebra.oracles import assert_untouched, dense, size, snapshot, total
from ..strategies import stacks, updates
from .table import LINEAR, Row

Stack = tuple[list[LowRank], list[float]]


class MergeLaws:
    """Laws of a method, checked on tiny random updates."""

    @given(update=updates())
    def test_one_adapter_with_weight_one_gives_itself(self, row: Row, update: LowRank) -> None:
        merged = row.make()([update], [1.0])
        assert (merged.dense() - dense(update)).norm() <= 1e-9 * size([update], [1.0])

    @given(stack=stacks(min_k=2), seed=st.integers(0, 1000))
    def test_the_order_of_the_adapters_does_not_matter(self, row: Row, stack: Stack, seed: int) -> None:
        pairs = list(zip(*stack, strict=True))
        random.Random(seed).shuffle(pairs)
        one = row.make()(*stack)
        other = row.make()([update for update, _ in pairs], [weight for _, weight in pairs])
        assert (one.dense() - other.dense()).norm() <= 1e-9 * size(*stack)

    @given(stack=stacks())
    def test_zero_adapters_give_zero(self, row: Row, stack: Stack) -> None:
        zero = [LowRank(b=torch.zeros_like(update.b), a=update.a, scale=update.scale) for update in stack[0]]
        merged = row.make()(zero, stack[1])
        assert merged.shape == zero[0].shape
        assert not merged.dense().any()

    @given(stack=stacks())
    def test_inputs_are_untouched(self, row: Row, stack: Stack) -> None:
        before = snapshot(stack[0])
        row.make()(*stack)
        assert_untouched(stack[0], before)

    @given(stack=stacks())
    def test_equal_inputs_give_equal_bytes(self, row: Row, stack: Stack) -> None:
        one, other = row.make()(*stack), row.make()(*stack)
        assert one.scale == other.scale
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)

    @given(stack=stacks())
    def test_finite_in_gives_finite_out_of_the_same_shape(self, row: Row, stack: Stack) -> None:
        merged = row.make()(*stack)
        assert merged.shape == stack[0][0].shape
        assert torch.isfinite(merged.dense()).all()

    @pytest.mark.parametrize(
        ("given_dtype", "expected"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
        ],
    )
    def test_half_precision_is_merged_in_float32_and_wider_is_kept(
        self, row: Row, given_dtype: torch.dtype, expected: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        stack = [
            LowRank(
                b=torch.randn(3, 2, generator=generator).to(given_dtype),
                a=torch.randn(2, 4, generator=generator).to(given_dtype),
            )
            for _ in range(2)
        ]
        merged = row.make()(stack, [0.9, 0.1])
        assert merged.a.dtype == merged.b.dtype == expected
        wide = row.make()([update.to(torch.float64) for update in stack], [0.9, 0.1])
        error = (merged.to(torch.float64).dense() - wide.dense()).norm()
        assert error <= 1e-6 * size(stack, [0.9, 0.1])

    @given(stack=stacks())
    def test_a_linear_method_is_the_weighted_sum(self, row: Row, stack: Stack) -> None:
        if LINEAR in row.laws:
            merged = row.make()(*stack)
            assert (merged.dense() - total(*stack)).norm() <= 1e-12 * size(*stack)
