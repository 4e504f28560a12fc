"""Every method against slow loops written from the papers' formulas, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adaptermix.algebra import Dense, LowRank, Stack
from adaptermix.algebra.draws import uniform
from adaptermix.methods import MergeMethod
from adaptermix.methods.base import build
from adaptermix.testing.stacks import generic, normal

from ..refusals import refuses
from . import oracles
from .oracles import Matrix

SHAPES = [(6, 5), (1, 7), (7, 1), (9, 4)]
WEIGHTS = [0.9, -0.4, 0.3]
POSITIVE = [0.9, 0.4, 0.3]


def stack_of(shape: tuple[int, int], weights: Sequence[float], *, rank: int = 2, **options: Any) -> Stack:
    return generic(shape, [rank] * len(weights), list(weights), seed=sum(shape), **options)


def deltas_of(stack: Stack) -> list[Matrix]:
    return [update.dense().numpy() for update in stack.updates]


def check(method: MergeMethod, stack: Stack, expected: Matrix, tolerance: float = 1e-9) -> None:
    found = method.fit(lambda: [stack])(stack).dense().numpy()
    assert np.linalg.norm(found - expected) <= tolerance * (1 + np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["elect-first", "scale-first"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.01])
def test_ties_is_trim_elect_and_mean(
    shape: tuple[int, int], order: str, normalize: bool, scope: str, density: float
) -> None:
    stack = stack_of(shape, WEIGHTS)
    method = build("ties", {"order": order, "normalize": normalize, "scope": scope, "density": density, "gain": 0.7})
    trimmed = [oracles.trim(delta, density) for delta in deltas_of(stack)]
    check(method, stack, 0.7 * oracles.consensus(trimmed, WEIGHTS, order, normalize))


def test_ties_over_the_model_trims_all_modules_of_an_adapter_as_one_vector() -> None:
    stacks = [replace(stack_of(shape, WEIGHTS), module=f"m{i}") for i, shape in enumerate(SHAPES)]
    method = build("ties", {"density": 0.3, "scope": "model"}).fit(lambda: stacks)
    whole = [np.concatenate([deltas_of(s)[i].ravel() for s in stacks]) for i in range(3)]
    trimmed = [oracles.trim(vector, 0.3) for vector in whole]
    start = 0
    for stack in stacks:
        size = stack.shape[0] * stack.shape[1]
        parts = [vector[start : start + size].reshape(stack.shape) for vector in trimmed]
        start += size
        expected = oracles.consensus(parts, WEIGHTS, "elect-first", normalize=True)
        assert np.allclose(method(stack).dense().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "outliers"), [(0.4, 0.1), (0.5, 0.5), (0.8, 0.2), (0.01, 0.01)])
def test_breadcrumbs_drops_the_outliers_and_keeps_what_follows(
    shape: tuple[int, int], density: float, outliers: float
) -> None:
    stack = stack_of(shape, WEIGHTS)
    trimmed = [oracles.trim(delta, density, outliers) for delta in deltas_of(stack)]
    total = sum(w * t for w, t in zip(WEIGHTS, trimmed, strict=True))
    options = {"density": density, "outliers": outliers}
    check(build("breadcrumbs", options), stack, np.asarray(total))
    elected = oracles.consensus(trimmed, WEIGHTS, "scale-first", normalize=False)
    check(build("breadcrumbs", {**options, "elect": True}), stack, elected)


def test_breadcrumbs_that_cannot_keep_what_they_promise_are_refused() -> None:
    with refuses(r"method.density: 0\.9.*0\.2"):
        build("breadcrumbs", {"density": 0.9, "outliers": 0.2})


@pytest.mark.parametrize("shape", SHAPES)
def test_magnitude_prune_is_the_weighted_sum_of_what_is_kept(shape: tuple[int, int]) -> None:
    stack = stack_of(shape, WEIGHTS)
    total = sum(w * oracles.trim(d, 0.35) for w, d in zip(WEIGHTS, deltas_of(stack), strict=True))
    check(build("magnitude-prune", {"density": 0.35}), stack, np.asarray(total))


def draws_of(stack: Stack) -> list[Matrix]:
    return [uniform(3, name, stack.module, first=0, shape=stack.shape).double().numpy() for name in stack.names]


@pytest.mark.parametrize("shape", SHAPES)
def test_dare_keeps_what_the_draws_say_and_divides_by_the_density(shape: tuple[int, int]) -> None:
    stack = replace(stack_of(shape, WEIGHTS), seed=3)
    dropped = [d * (u < 0.6) / 0.6 for d, u in zip(deltas_of(stack), draws_of(stack), strict=True)]
    total = sum(w * d for w, d in zip(WEIGHTS, dropped, strict=True))
    check(build("dare-linear", {"density": 0.6}), stack, np.asarray(total))
    check(
        build("dare-ties", {"density": 0.6}), stack, oracles.consensus(dropped, WEIGHTS, "elect-first", normalize=True)
    )


@pytest.mark.parametrize("shape", [(6, 5), (9, 4), (1, 7)])
def test_della_keeps_by_rank_in_the_row_and_divides_by_each_chance(shape: tuple[int, int]) -> None:
    stack = replace(stack_of(shape, WEIGHTS), seed=3)
    dropped = []
    for delta, draw in zip(deltas_of(stack), draws_of(stack), strict=True):
        chances = oracles.della_chances(delta, 0.5, 0.6)
        dropped.append(delta * (draw < chances) / chances)
    options = {"density": 0.5, "epsilon": 0.6}
    check(build("della", options), stack, oracles.consensus(dropped, WEIGHTS, "elect-first", normalize=True))
    total = sum(w * d for w, d in zip(WEIGHTS, dropped, strict=True))
    check(build("della", {**options, "elect": False}), stack, np.asarray(total))


def test_della_on_one_column_keeps_with_the_density() -> None:
    stack = replace(stack_of((40, 1), [1.0], rank=1), seed=3)
    kept = draws_of(stack)[0] < 0.5
    check(build("della", {"elect": False}), stack, deltas_of(stack)[0] * kept / 0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_slerp_goes_along_the_arc(shape: tuple[int, int]) -> None:
    stack = stack_of(shape, [0.75, 1.25])
    check(build("slerp", {}), stack, 2.0 * oracles.slerp(*deltas_of(stack), t=0.625))


@pytest.mark.parametrize("shape", [(6, 5), (9, 4), (3, 3)])
def test_karcher_is_where_descent_on_the_sphere_ends(shape: tuple[int, int]) -> None:
    stack = stack_of(shape, POSITIVE, acute=True)
    check(build("karcher", {}), stack, oracles.karcher(deltas_of(stack), POSITIVE), 1e-8)


@pytest.mark.parametrize("acute", [True, False])
def test_model_stock_is_the_sum_times_the_ratio_of_the_paper(acute: bool) -> None:
    stack = stack_of((6, 5), WEIGHTS, acute=acute)
    check(build("model-stock", {}), stack, oracles.model_stock(deltas_of(stack), WEIGHTS))


@pytest.mark.parametrize("shape", [(6, 5), (9, 4), (4, 9)])
@pytest.mark.parametrize("order", ["elect-first", "scale-first"])
def test_knots_merges_in_the_joint_basis(shape: tuple[int, int], order: str) -> None:
    stack = stack_of(shape, WEIGHTS)
    expected = oracles.knots(deltas_of(stack), WEIGHTS, 0.4, order)
    check(build("knots", {"density": 0.4, "order": order}), stack, expected)


@pytest.mark.parametrize("shape", [(6, 5), (9, 4), (4, 9), (1, 7), (7, 1), (20, 12)])
@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_tsv_multiplies_the_polar_factors(shape: tuple[int, int], share: float | None) -> None:
    stack = stack_of(shape, WEIGHTS)
    check(build("tsv", {"share": share}), stack, oracles.tsv(deltas_of(stack), WEIGHTS, share))


def orthogonal(k: int, rank: int, side: int) -> Stack:
    """Adapters in subspaces that are orthogonal to each other: nothing interferes."""
    generator = torch.Generator().manual_seed(k)
    bases = [torch.linalg.qr(normal(side, side, generator)).Q for _ in range(2)]
    updates = []
    for i in range(k):
        part = slice(i * rank, (i + 1) * rank)
        spectrum = torch.linspace(2.0, 0.5, rank, dtype=torch.float64)
        updates.append(LowRank(b=bases[0][:, part] * spectrum, a=bases[1][:, part].T.contiguous()))
    return Stack.of(updates, [0.7 + 0.1 * i for i in range(k)])


@pytest.mark.parametrize("k", [2, 4, 8])
def test_tsv_by_default_cuts_no_lora_whose_rank_times_the_count_fits(k: int) -> None:
    stack = orthogonal(k, 8, 64)
    merged, cut = build("tsv", {}).measured(stack)
    expected = stack.combined(stack.weights).dense()
    assert float((merged.dense() - expected).norm() / expected.norm()) < 1e-12
    assert cut == 0.0


@pytest.mark.parametrize(("options", "side"), [({"share": 0.5}, 64), ({}, 24)])
def test_tsv_tells_what_it_cuts(options: dict[str, Any], side: int) -> None:
    """Four adapters of rank 6: half of it is cut where that is asked for, and nothing of 24 / 4 = 6."""
    stack = orthogonal(4, 6, side)
    merged, cut = build("tsv", options).measured(stack)
    expected = stack.combined(stack.weights).dense()
    lost = float((merged.dense() - expected).norm() / expected.norm())
    assert cut == pytest.approx(lost, abs=1e-12)
    assert (cut > 0.2) == bool(options)


def test_tsv_cuts_where_the_ranks_do_not_fit() -> None:
    """Two deltas of rank 5 in a 6 x 6 module: 6 // 2 = 3 of 5 singular values stay."""
    stack = stack_of((6, 6), [1.0, 1.0], rank=5)
    _, cut = build("tsv", {}).measured(stack)
    values = [np.linalg.svd(delta, compute_uv=False) for delta in deltas_of(stack)]
    lost = math.sqrt(sum(float((s[3:] ** 2).sum()) for s in values) / sum(float((s**2).sum()) for s in values))
    assert cut == pytest.approx(lost, rel=1e-9)


@pytest.mark.parametrize("name", ["iso-c", "tsv"])
def test_a_floor_removes_the_directions_that_16_bits_make_up(name: str) -> None:
    """An adapter with its own bfloat16 copy is that adapter."""
    stack = stack_of((40, 30), [0.5, 0.5], rank=4)
    first = stack.updates[0]
    assert isinstance(first, LowRank)
    copy = LowRank(b=first.b.bfloat16().double(), a=first.a.bfloat16().double(), scale=first.scale)
    alone = build(name, {})(Stack.of([first], [1.0])).dense()
    stack = replace(stack, updates=(first, copy))

    def cosine(options: dict[str, Any]) -> float:
        found = build(name, options)(stack).dense()
        return float((found * alone).sum() / found.norm() / alone.norm())

    assert cosine({"floor": 0.02}) > 0.999
    assert cosine({}) < 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_has_a_flat_spectrum(shape: tuple[int, int]) -> None:
    stack = stack_of(shape, WEIGHTS, rank=1)
    check(build("iso-c", {}), stack, oracles.iso_c(deltas_of(stack), WEIGHTS))


@pytest.mark.parametrize("zeros", [False, True])
def test_fisher_is_the_mean_weighted_entry_by_entry(zeros: bool) -> None:
    stack = stack_of((6, 5), POSITIVE)
    found = [np.random.default_rng(i).random((6, 5)) * (np.arange(30).reshape(6, 5) > 9 * zeros) for i in range(3)]
    stack = replace(stack, statistics=tuple(map(torch.from_numpy, found)))
    check(build("fisher", {}), stack, oracles.fisher(deltas_of(stack), POSITIVE, found))


def test_regmean_is_the_least_squares_solution() -> None:
    stack = stack_of((6, 5), POSITIVE)
    inputs = [np.random.default_rng(i).normal(size=(4, 5)) for i in range(3)]
    stack = replace(stack, statistics=tuple(torch.from_numpy(x.T @ x) for x in inputs))
    expected = oracles.regmean(deltas_of(stack), POSITIVE, inputs)
    check(build("regmean", {"off_diagonal": 1.0}), stack, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_regmean_does_not_invert_the_rounding_of_stored_statistics(
    dtype: torch.dtype, tolerance: float, off_diagonal: float
) -> None:
    """48 features of which 20 inputs each reach 40 directions: the other 8 have no input but what rounding leaves."""
    stack = stack_of((6, 48), [0.6, 0.4])
    generator = torch.Generator().manual_seed(3)
    sizes = torch.exp(normal(48, 1, generator)).T
    grams = [x.T @ x for x in (normal(20, 48, generator) * sizes for _ in range(2))]
    shrunk = [off_diagonal * g + (1 - off_diagonal) * torch.diag(g.diagonal()) for g in grams]
    deltas = [torch.from_numpy(delta) for delta in deltas_of(stack)]
    total = sum(w * g for w, g in zip(stack.weights, shrunk, strict=True))
    inverse = torch.linalg.pinv(total, rtol=1e-12, hermitian=True)
    rest = torch.eye(48, dtype=torch.float64) - total @ inverse
    expected = sum(w * (d @ g @ inverse + d @ rest) for w, d, g in zip(stack.weights, deltas, shrunk, strict=True))
    stack = replace(stack, statistics=tuple(gram.to(dtype) for gram in grams))
    found = build("regmean", {"off_diagonal": off_diagonal})(stack).dense()
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_regmean_is_the_weighted_mean_where_no_input_points() -> None:
    stack = stack_of((6, 5), POSITIVE)
    stack = replace(stack, statistics=tuple(torch.zeros(5, 5, dtype=torch.float64) for _ in POSITIVE))
    mean = sum(w * d for w, d in zip(POSITIVE, deltas_of(stack), strict=True)) / sum(POSITIVE)
    check(build("regmean", {}), stack, np.asarray(mean))


def test_peft_linear_adds_the_factors_with_roots_of_the_weights() -> None:
    stack = stack_of((6, 5), WEIGHTS)
    b, a = np.zeros((6, 2)), np.zeros((2, 5))
    for update, weight in zip(stack.updates, WEIGHTS, strict=True):
        assert isinstance(update, LowRank)
        factor = weight * update.scale
        b += abs(factor) ** 0.5 * update.b.numpy()
        a += np.sign(factor) * abs(factor) ** 0.5 * update.a.numpy()
    check(build("peft-linear", {}), stack, b @ a)


def test_factor_average_is_the_scale_times_the_product_of_averaged_factors() -> None:
    """0.9 and 0.1 give 0.81, 0.01 and the cross terms at 0.09 each."""
    stack = stack_of((6, 5), (0.9, 0.1))
    one, two = (replace(update, scale=2.0) for update in stack.updates if isinstance(update, LowRank))
    found = build("factor-average", {})(replace(stack, updates=(one, two))).dense().numpy()
    parts = [(0.81, one, one), (0.01, two, two), (0.09, one, two), (0.09, two, one)]
    expected = sum(share * 2.0 * left.b.numpy() @ right.a.numpy() for share, left, right in parts)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_slerp_of_factors_that_cancel_is_no_error() -> None:
    """B A = 0 with neither zero: rounding may leave the squared norm below 0."""
    for seed in range(30):
        x = generic((5, 5), [2], [1.0], seed=seed).updates[0]
        assert isinstance(x, LowRank)
        nothing = LowRank(b=torch.cat([x.b, x.b / 3], dim=1), a=torch.cat([x.a, -3 * x.a]))
        found = build("slerp", {})(Stack.of([nothing, Dense(w=torch.eye(5, dtype=torch.float64))], [0.5, 0.5]))
        other = build("slerp", {})(Stack.of([nothing, nothing], [0.5, 0.5]))
        assert torch.isfinite(found.dense()).all()
        assert torch.isfinite(other.dense()).all()
