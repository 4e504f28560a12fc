"""LowRank and Dense: values with a shape and a dense meaning."""

from __future__ import annotations

import dataclasses

import jaxtyping
import pytest
import torch
from hypothesis import given

from adaptermix.algebra import Dense, LowRank

from ..strategies import SCALES, updates
from .oracles import dense


@given(updates())
def test_dense_is_scale_times_b_times_a(update: LowRank) -> None:
    torch.testing.assert_close(update.dense(), dense(update), rtol=1e-12, atol=1e-9)
    assert update.dense().shape == update.shape


@given(updates(), SCALES)
def test_a_factor_multiplies_the_delta_and_keeps_the_factors(update: LowRank, weight: float) -> None:
    scaled = update * weight
    torch.testing.assert_close(scaled.dense(), weight * dense(update), rtol=1e-12, atol=1e-9)
    assert scaled.a is update.a
    assert scaled.b is update.b
    assert (weight * update).scale == scaled.scale


@given(updates())
def test_the_true_rank_is_at_most_the_rank(update: LowRank) -> None:
    assert torch.linalg.matrix_rank(dense(update)) <= update.rank


def test_to_changes_the_dtype_of_both_factors_and_nothing_else() -> None:
    update = LowRank(b=torch.ones(3, 2), a=torch.ones(2, 4), scale=-0.5)
    half = update.to(torch.bfloat16)
    assert (half.a.dtype, half.b.dtype, half.scale) == (torch.bfloat16, torch.bfloat16, -0.5)
    assert update.a.dtype == torch.float32


def test_factors_that_disagree_about_the_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Users run without the tests' shape checks, which would refuse it first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"same rank, got b \[3, 2\] and a \[1, 4\]"):
        LowRank(b=torch.ones(3, 2), a=torch.ones(1, 4))


@pytest.mark.parametrize("cls", [LowRank, Dense])
def test_updates_are_frozen_and_compared_by_identity(cls: type) -> None:
    make = (
        (lambda: LowRank(b=torch.ones(1, 1), a=torch.ones(1, 1)))
        if cls is LowRank
        else (lambda: Dense(w=torch.ones(1, 1)))
    )
    one, other = make(), make()
    assert one != other
    assert len({one, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, dataclasses.fields(one)[0].name, torch.zeros(1, 1))


def test_a_dense_update_scales_from_both_sides() -> None:
    update = Dense(w=torch.tensor([[1.0, -2.0]]))
    assert (update * 3.0).dense().tolist() == [[3.0, -6.0]]
    assert (3.0 * update).dense().tolist() == [[3.0, -6.0]]
    assert update.shape == (1, 2)
    assert update.dense().tolist() == [[1.0, -2.0]]
