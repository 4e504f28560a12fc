"""Subspaces of updates, against projectors made from the dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaptermix.algebra import LowRank, cosine
from adaptermix.algebra.subspaces import (
    chance_overlap,
    frame,
    frame_cosine,
    numerical_rank,
    overlap,
    share_within,
)

from ..strategies import stacks, updates
from .oracles import assert_untouched, dense, size, snapshot

Stack = tuple[list[LowRank], list[float]]


def projectors(update: LowRank) -> tuple[Tensor, Tensor, int]:
    """Onto the column and the row space of the dense matrix, and its rank."""
    matrix = dense(update)
    u, sigma, vh = torch.linalg.svd(matrix)
    rank = int((sigma > 1e-11 * size([update], [1.0])).sum())
    return u[:, :rank] @ u[:, :rank].T, vh[:rank].T @ vh[:rank], rank


def basis(generator: torch.Generator, n: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]


@given(updates())
def test_a_frame_is_the_thin_svd_of_the_dense_matrix(update: LowRank) -> None:
    found = frame(update)
    tolerance = 1e-10 * size([update], [1.0]) + 1e-300
    assert torch.allclose(found.left * found.sigma @ found.right.T, dense(update), rtol=0, atol=tolerance)
    for side in (found.left, found.right):
        assert torch.allclose(side.T @ side, torch.eye(found.rank, dtype=torch.float64), atol=1e-12)
    assert found.norm == pytest.approx(float(dense(update).norm()), abs=tolerance)
    assert bool((found.sigma > 0).all())
    assert found.rank == projectors(update)[2]


@given(updates())
def test_stable_rank_lies_between_one_and_the_rank(update: LowRank) -> None:
    found = frame(update)
    if found.rank:
        assert 1 <= found.stable_rank <= found.rank * (1 + 1e-12)
    else:
        assert (found.stable_rank, found.norm) == (0.0, 0.0)


@given(stacks(min_k=2, max_k=2))
def test_overlap_is_the_trace_of_the_product_of_projectors(stack: Stack) -> None:
    (x, y), _ = stack
    one, other = frame(x), frame(y)
    (left_x, right_x, k), (left_y, right_y, m) = projectors(x), projectors(y)
    if not (k and m):
        assert overlap(one.left, other.left) is None
        assert overlap(one.right, other.right) is None
        return
    for found, p, q in (
        (overlap(one.left, other.left), left_x, left_y),
        (overlap(one.right, other.right), right_x, right_y),
    ):
        assert found == pytest.approx(float(torch.trace(p @ q)) / min(k, m), abs=1e-8)
        assert found is not None
        assert 0 <= found <= 1
    assert overlap(one.left, other.left) == pytest.approx(overlap(other.left, one.left), abs=1e-12)


@given(stacks(min_k=2, max_k=2))
def test_the_share_within_is_that_of_the_projected_matrix(stack: Stack) -> None:
    (x, y), _ = stack
    one, other = frame(x), frame(y)
    p, q, _ = projectors(y)
    share = share_within(one, other)
    if not one.rank:
        assert share is None
        return
    assert share == pytest.approx(float((p @ dense(x) @ q).norm() / dense(x).norm()) ** 2, abs=1e-8)
    assert share_within(one, one) == pytest.approx(1.0)


@given(stacks(min_k=2, max_k=2))
def test_the_cosine_of_frames_is_that_of_the_updates(stack: Stack) -> None:
    (x, y), _ = stack
    one, other = frame(x), frame(y)
    if one.rank and other.rank:
        assert frame_cosine(one, other) == pytest.approx(cosine(x, y), abs=1e-7)
        assert frame_cosine(one, one) == pytest.approx(1.0)
        assert frame_cosine(one, frame(x * -3.0)) == pytest.approx(-1.0)
    else:
        assert frame_cosine(one, other) is None


@given(updates(max_rank=3), st.sampled_from([2.0, -0.5, 1e6]))
def test_other_factors_of_one_update_give_the_same_subspaces(update: LowRank, factor: float) -> None:
    """B G and G^-1 A, and any scale but zero."""
    g = torch.triu(torch.ones(update.rank, update.rank, dtype=torch.float64)) * factor
    other = LowRank(b=update.b @ g, a=torch.linalg.inv(g) @ update.a, scale=update.scale * factor)
    one, two = frame(update), frame(other)
    assert one.rank == two.rank
    if one.rank:
        assert overlap(one.left, two.left) == pytest.approx(1.0, abs=1e-9)
        assert overlap(one.right, two.right) == pytest.approx(1.0, abs=1e-9)
        assert two.norm == pytest.approx(abs(factor) * one.norm, rel=1e-9)


@pytest.mark.parametrize("degrees", [0, 30, 45, 60, 90])
def test_the_overlap_of_two_lines_is_the_squared_cosine_of_their_angle(degrees: int) -> None:
    """[1 0] and [cos t, sin t] have the angle t."""
    t = math.radians(degrees)
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    y = torch.tensor([[math.cos(t)], [math.sin(t)]], dtype=torch.float64)
    assert overlap(x, y) == pytest.approx(math.cos(t) ** 2, abs=1e-12)


def test_overlap_of_planes_in_four_dimensions_worked_by_hand() -> None:
    """span(e1, e2) and span(e1, cos t e2 + sin t e3) with t = 60 degrees: cosines 1 and 1/2, mean square 5/8."""
    e = torch.eye(4, dtype=torch.float64)
    x = e[:, :2]
    y = torch.stack([e[:, 0], 0.5 * e[:, 1] + math.sqrt(0.75) * e[:, 2]], dim=1)
    assert overlap(x, y) == pytest.approx(5 / 8)
    assert overlap(x, e[:, 2:]) == 0.0
    assert overlap(x, e[:, :3]) == pytest.approx(1.0)


def test_random_subspaces_overlap_as_chance_says() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [overlap(basis(generator, 40, 4), basis(generator, 40, 8)) or 0.0 for _ in range(200)]
    assert sum(found) / len(found) == pytest.approx(chance_overlap(4, 8, 40), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numerical_rank_is_that_of_the_stored_factors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    b, a = torch.randn(512, 6, generator=generator).to(dtype), torch.randn(6, 300, generator=generator).to(dtype)
    assert frame(LowRank(b=b, a=a)).rank == 6
    twice = LowRank(b=torch.cat([b, b], dim=1), a=torch.cat([a, a * 2]), scale=0.125)
    assert frame(twice).rank == 6


def test_factors_that_cancel_are_a_zero_update() -> None:
    generator = torch.Generator().manual_seed(2)
    b, a = torch.randn(64, 4, generator=generator), torch.randn(4, 48, generator=generator)
    found = frame(LowRank(b=torch.cat([b, b], dim=1), a=torch.cat([a, -a])))
    assert (found.rank, found.norm, found.stable_rank) == (0, 0.0, 0.0)
    assert tuple(found.left.shape) == (64, 0)
    assert tuple(found.right.shape) == (48, 0)
    for zero in (LowRank(b=b, a=a, scale=0.0), LowRank(b=b * 0, a=a)):
        assert frame(zero).rank == 0


def test_the_rule_of_the_numerical_rank() -> None:
    sigma = torch.tensor([1.0, 1e-10, 2e-14, 1e-15, 0.0], dtype=torch.float64)
    assert numerical_rank(sigma, (100, 10)) == 2  # 100 * 2.2e-16 = 2.2e-14
    assert numerical_rank(sigma, (10, 10)) == 3
    assert numerical_rank(sigma, (100, 10), size=1e6) == 1
    assert numerical_rank(sigma * 0, (100, 10)) == 0
    assert numerical_rank(sigma[:0], (100, 10)) == 0


def test_scales_near_the_ends_of_float64_are_carried_and_beyond_it_refused() -> None:
    one = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2))
    assert frame(one * 1e200).norm == pytest.approx(2e200)
    assert frame_cosine(frame(one * 1e200), frame(one * -1e-200)) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match=r"must be finite in float64, and overflows with scale 1e\+308"):
        frame(one * 1e308)


@given(stacks(min_k=2, max_k=2, dtype=torch.float32))
def test_inputs_are_untouched(stack: Stack) -> None:
    updates, _ = stack
    before = snapshot(updates)
    for update in updates:
        frame(update)
    assert_untouched(updates, before)
