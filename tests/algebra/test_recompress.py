"""recompress: the optimum of Eckart and Young, against the SVD of the dense float64 matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.algebra import LowRank, concatenate, norm, recompress, singular_values

from ..strategies import stacks, updates
from .oracles import assert_untouched, dense, snapshot

RANKS = st.integers(1, 7)


def optimum(update: LowRank, rank: int) -> tuple[torch.Tensor, float, float]:
    """Best approximation, its relative error, and the gap between the last value kept and the first dropped."""
    u, sigma, vh = torch.linalg.svd(dense(update), full_matrices=False)
    best = u[:, :rank] @ torch.diag(sigma[:rank]) @ vh[:rank]
    total = math.sqrt(float((sigma**2).sum()))
    lost = math.sqrt(float((sigma[rank:] ** 2).sum()))
    gap = float(sigma[rank - 1] - sigma[rank]) if rank < len(sigma) else float("inf")
    return best, lost / total if total > 0 else 0.0, gap / total if total > 0 else float("inf")


@given(updates(), RANKS)
def test_it_is_the_best_approximation(update: LowRank, rank: int) -> None:
    low, residual = recompress(update, rank)
    best, expected, gap = optimum(update, rank)
    length = float(dense(update).norm())
    error = float((low.dense() - dense(update)).norm())
    assert error == pytest.approx(expected * length, abs=1e-6 * length + 1e-12)  # factors may cancel to zero
    assert residual == pytest.approx(expected, abs=1e-6)
    if gap > 1e-3:  # the optimum is unique
        assert (low.dense() - best).norm() <= 1e-6 * length


@given(updates(dtype=torch.float32), RANKS)
def test_it_is_the_best_approximation_of_float32_factors(update: LowRank, rank: int) -> None:
    low, residual = recompress(update, rank)
    _, expected, _ = optimum(update, rank)
    length = float(dense(update).norm())
    assert low.a.dtype == low.b.dtype == torch.float32
    error = float((low.to(torch.float64).dense() - dense(update)).norm())
    assert error == pytest.approx(expected * length, abs=1e-6 * length + 1e-12)  # factors may cancel to zero
    assert residual == pytest.approx(expected, abs=1e-6)


@given(stacks(min_k=2, max_rank=2), RANKS)
def test_it_is_the_best_approximation_of_a_merge(stack: tuple[list[LowRank], list[float]], rank: int) -> None:
    merged = concatenate(*stack)
    _, residual = recompress(merged, rank)
    length = float(dense(merged).norm())
    if length > 1e-6 * float(merged.b.norm() * merged.a.norm()):  # not a sum that cancels
        assert residual == pytest.approx(optimum(merged, rank)[1], abs=1e-6)


@given(updates(), RANKS)
def test_the_rank_is_the_least_of_what_is_wanted_and_what_exists(update: LowRank, rank: int) -> None:
    low, residual = recompress(update, rank)
    assert low.rank == min(rank, update.rank, *update.shape)
    assert low.shape == update.shape
    assert low.scale == 1.0
    assert 0.0 <= residual <= 1.0


@given(updates())
def test_a_rank_at_or_above_the_inputs_keeps_everything(update: LowRank) -> None:
    for rank in (update.rank, update.rank + 5):
        low, residual = recompress(update, rank)
        assert residual == 0.0
        assert (low.dense() - dense(update)).norm() <= 1e-9 * float(dense(update).norm())


@given(updates(), RANKS)
def test_recompressing_twice_changes_nothing(update: LowRank, rank: int) -> None:
    low, _ = recompress(update, rank)
    again, residual = recompress(low, rank)
    assert residual <= 1e-6
    assert (again.dense() - low.dense()).norm() <= 1e-9 * float(dense(update).norm())


@given(updates(max_rank=3), st.integers(0, 1000), RANKS)
def test_the_gauge_of_the_factors_does_not_matter(update: LowRank, seed: int, rank: int) -> None:
    """(B R)(R^-1 A) is the same delta as B A."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(update.rank, update.rank, generator=generator, dtype=torch.float64)
    mixer = 2.0 * torch.eye(update.rank, dtype=torch.float64) + 0.3 * noise / max(1.0, float(noise.norm()))
    other = LowRank(b=update.b @ mixer, a=torch.linalg.solve(mixer, update.a), scale=update.scale)
    one, other_low = recompress(update, rank), recompress(other, rank)
    length = float(dense(update).norm())
    assert one[1] == pytest.approx(other_low[1], abs=1e-6)
    if optimum(update, rank)[2] > 1e-3:
        assert (one[0].dense() - other_low[0].dense()).norm() <= 1e-9 * length
    # Values that are zero in theory are roundings of the factors' size.
    size = abs(update.scale) * float(update.b.norm() * update.a.norm())
    torch.testing.assert_close(singular_values(update), singular_values(other), rtol=1e-9, atol=1e-9 * size)


@given(updates())
def test_singular_values_are_those_of_the_dense_matrix(update: LowRank) -> None:
    sigma = singular_values(update)
    expected = torch.linalg.svdvals(dense(update))
    assert sigma.dtype == torch.float64
    assert len(sigma) == min(update.rank, *update.shape)
    assert (sigma.diff() <= 0).all()
    size = abs(update.scale) * float(update.b.norm() * update.a.norm())
    torch.testing.assert_close(sigma, expected[: len(sigma)], rtol=1e-9, atol=1e-9 * size)
    assert float(sigma.norm()) == pytest.approx(float(dense(update).norm()), rel=1e-9, abs=1e-9 * size)
    assert float(sigma.norm()) == pytest.approx(norm(update), rel=1e-6, abs=1e-7 * size)


@pytest.mark.parametrize(("out", "into"), [(1, 1), (1, 5), (5, 1)])
def test_one_row_or_one_column_has_rank_one(out: int, into: int) -> None:
    generator = torch.Generator().manual_seed(3)
    update = LowRank(
        b=torch.randn(out, 4, generator=generator, dtype=torch.float64),
        a=torch.randn(4, into, generator=generator, dtype=torch.float64),
        scale=-2.0,
    )
    low, residual = recompress(update, 1)
    assert (low.rank, residual) == (1, 0.0)
    torch.testing.assert_close(low.dense(), dense(update), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_a_zero_delta_stays_zero_and_loses_nothing(rank: int) -> None:
    for update in (
        LowRank(b=torch.zeros(3, 2), a=torch.ones(2, 4)),
        LowRank(b=torch.ones(3, 2), a=torch.ones(2, 4), scale=0.0),
    ):
        low, residual = recompress(update, rank)
        assert residual == 0.0
        assert not low.dense().any()
        assert torch.isfinite(low.a).all()
        assert torch.isfinite(low.b).all()


def test_both_factors_carry_the_same_share_of_the_norm() -> None:
    update = LowRank(b=1e4 * torch.eye(3)[:, :2], a=1e-4 * torch.eye(4)[:2], scale=9.0)
    low, _ = recompress(update, 2)
    assert float(low.a.norm()) == pytest.approx(float(low.b.norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_in_float32(dtype: torch.dtype) -> None:
    update = LowRank(b=torch.eye(3, 2).to(dtype), a=torch.eye(2, 3).to(dtype))
    low, residual = recompress(update, 1)
    assert low.a.dtype == low.b.dtype == torch.float32
    assert residual == pytest.approx(math.sqrt(0.5), rel=1e-12)


def test_a_worked_example_loses_what_pythagoras_says() -> None:
    """diag(4, 3) at rank 1 keeps 4 and loses 3 of 5."""
    update = LowRank(b=torch.diag(torch.tensor([4.0, 3.0])), a=torch.eye(2))
    low, residual = recompress(update, 1)
    torch.testing.assert_close(low.dense(), torch.diag(torch.tensor([4.0, 0.0])))
    assert residual == pytest.approx(0.6, rel=1e-12)


@given(updates(), RANKS)
def test_inputs_are_untouched(update: LowRank, rank: int) -> None:
    before = snapshot([update])
    recompress(update, rank)
    singular_values(update)
    assert_untouched([update], before)


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    update = LowRank(b=torch.ones(2, 1), a=torch.ones(1, 2))
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        recompress(update, rank)
