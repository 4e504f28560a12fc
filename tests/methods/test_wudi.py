"""WUDI and DO-Merging: what their objectives and formulas promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptermix.algebra import LowRank, Stack, norm
from adaptermix.methods.base import build
from adaptermix.testing.stacks import generic

from ..refusals import refuses
from . import oracles

ONES = [1.0, 1.0, 1.0]


def deltas_of(stack: Stack) -> list[Tensor]:
    return [update.dense().double() for update in stack.updates]


def interference(merged: Tensor, stack: Stack) -> Tensor:
    """The paper's objective, on dense matrices."""
    pairs = zip(deltas_of(stack), stack.weights, strict=True)
    losses = [((merged - w * delta) @ delta.T).square().sum() / delta.square().sum() for delta, w in pairs]
    return torch.stack(losses).sum()


def by_descent(stack: Stack, steps: int = 4000) -> Tensor:
    """Where gradient descent with momentum ends that starts from the sum."""
    deltas = deltas_of(stack)
    grams = [delta.T @ delta / delta.square().sum() for delta in deltas]
    slope, wanted = 2 * torch.stack(grams).sum(0), torch.zeros_like(deltas[0])
    for weight, delta, gram in zip(stack.weights, deltas, grams, strict=True):
        wanted += 2 * weight * delta @ gram
    merged = stack.combined(stack.weights).dense().double()
    velocity, rate = torch.zeros_like(merged), 1 / float(torch.linalg.matrix_norm(slope, 2))
    for _ in range(steps):
        velocity = 0.9 * velocity - rate * (merged @ slope - wanted)
        merged = merged + velocity
    return merged


@pytest.mark.parametrize(("shape", "ranks"), [((9, 12), (2, 3, 1)), ((6, 4), (3, 2, 2)), ((5, 3), (3, 3, 3))], ids=str)
@pytest.mark.parametrize("weights", [ONES, [1.0, -0.5, 0.3]], ids=str)
def test_the_closed_form_is_where_descent_ends(
    shape: tuple[int, int], ranks: tuple[int, ...], weights: list[float]
) -> None:
    stack = generic(shape, list(ranks), weights, seed=sum(shape))
    found = build("wudi", {"ridge": 0.0})(stack).dense()
    descended = by_descent(stack)
    start = float(interference(stack.combined(weights).dense(), stack))
    assert float(interference(descended, stack)) < start
    assert float(interference(found, stack)) <= float(interference(descended, stack)) + 1e-9 * start
    assert float((found - descended).norm()) <= 1e-3 * float(descended.norm())
    if sum(ranks) <= shape[1]:  # the inputs that they read can be told apart
        assert float(interference(found, stack)) <= 1e-12 * start


@pytest.mark.parametrize("shape", [(9, 12), (6, 4), (1, 6), (6, 1)])
@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
def test_wudi_is_the_oracle_of_dense_least_squares(shape: tuple[int, int], ridge: float) -> None:
    stack = generic(shape, [2, 1, 2], [0.9, -0.4, 0.3], seed=3)
    expected = oracles.wudi([delta.numpy() for delta in deltas_of(stack)], list(stack.weights), ridge)
    found = build("wudi", {"ridge": ridge})(stack).dense().numpy()
    assert np.linalg.norm(found - expected) <= 1e-8 * (1 + np.linalg.norm(expected))


def test_where_the_inputs_are_orthogonal_wudi_is_the_sum() -> None:
    rows = torch.linalg.qr(torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.T
    left = generic((5, 3), [3], [1.0], seed=1).updates[0].dense()
    stack = Stack.of([LowRank(b=left, a=rows[:3]), LowRank(b=-2 * left, a=rows[3:])], [1.0, 0.7])
    for ridge in (0.0, 0.5):
        found = build("wudi", {"ridge": ridge})(stack).dense()
        assert torch.allclose(found, stack.combined(stack.weights).dense(), atol=1e-12)


def test_adapters_of_the_same_inputs_are_averaged() -> None:
    first = generic((5, 8), [1], [1.0], seed=1).updates[0]
    assert isinstance(first, LowRank)
    other = LowRank(b=-3 * first.b, a=first.a)
    found = build("wudi", {"ridge": 0.0})(Stack.of([first, other])).dense()
    assert torch.allclose(found, (first.dense() + other.dense()) / 2)


def test_a_ridge_keeps_adapters_of_nearly_the_same_inputs_from_growing() -> None:
    first = generic((5, 8), [1], [1.0], seed=1).updates[0]
    assert isinstance(first, LowRank)
    turn = torch.linspace(-1, 1, 8, dtype=torch.float64)[None]
    stack = Stack.of([first, LowRank(b=-3 * first.b, a=first.a + 1e-5 * turn)])
    free, kept = (norm(build("wudi", {"ridge": ridge})(stack)) for ridge in (0.0, 0.01))
    assert free > 1000 * norm(first)
    assert kept < 3 * norm(first)


def test_a_ridge_below_zero_is_refused() -> None:
    with refuses("method.ridge"):
        build("wudi", {"ridge": -0.1})


@pytest.mark.parametrize("shape", [(6, 5), (1, 7), (7, 1), (9, 4)])
@pytest.mark.parametrize("per", ["column", "module"])
@pytest.mark.parametrize("weights", [[0.9, -0.4, 0.3], [1 / 3] * 3], ids=str)
def test_do_merging_is_the_mean_length_times_the_sum_of_directions(
    shape: tuple[int, int], per: str, weights: list[float]
) -> None:
    stack = generic(shape, [2, 3, 1], weights, seed=2)
    expected = 0.5 * oracles.do_merging([delta.numpy() for delta in deltas_of(stack)], weights, per)
    found = build("do-merging", {"per": per, "gain": 0.5})(stack)
    assert isinstance(found, LowRank)
    assert found.rank == 6
    assert np.linalg.norm(found.dense().numpy() - expected) <= 1e-10 * np.linalg.norm(expected)


def test_a_long_adapter_does_not_drown_a_short_one() -> None:
    one, other = deltas_of(generic((6, 5), [2, 2], [1.0, 1.0], seed=4))
    for per in ("column", "module"):
        stack = Stack.of(
            [LowRank(b=one, a=torch.eye(5).double()), LowRank(b=other, a=torch.eye(5).double(), scale=1e-3)], [0.5, 0.5]
        )
        found = build("do-merging", {"per": per})(stack).dense()
        cosines = [float((found * delta).sum() / found.norm() / delta.norm()) for delta in (one, other)]
        assert min(cosines) > 0.4
        plain = stack.combined(stack.weights).dense()
        assert float((plain * other).sum() / plain.norm() / other.norm()) < 0.3


def test_a_column_that_an_adapter_lacks_is_left_to_the_others() -> None:
    first = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    eye = torch.eye(2).double()
    # In the second one the column of zeros is 1 - 1: rounding is no direction.
    cancelling = torch.cat([first, eye, -eye], dim=1)
    stack = Stack.of(
        [LowRank(b=cancelling, a=torch.cat([eye, eye, eye])), LowRank(b=other, a=eye)],
        [0.5, 0.5],
    )
    found = build("do-merging", {})(stack).dense()
    wanted = torch.tensor([[0.5 * 0.6 * 3, 0.5 * 2], [0.5 * (0.8 + 1) * 3, 0.0]], dtype=torch.float64)
    assert torch.allclose(found, wanted, atol=1e-12)
