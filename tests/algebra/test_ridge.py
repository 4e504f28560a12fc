"""Ridge in closed form against plain least squares and refits, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermix.algebra.ridge import Products, choose_penalty, left_out_residuals, reduced_rank, ridge_map, solve_ridge


def draw(seed: int, rows: int, into: int, out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(rows, into) + 2
    return x, x @ normal(into, out) + 0.3 * normal(rows, out) + 1, torch.rand(rows, generator=generator).double() + 0.5


def affine(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, penalty: float) -> torch.Tensor:
    """The oracle: least squares on rows that stand for the penalty too; the last row is the constant's."""
    root = weights.sqrt()[:, None]
    design = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    extra = torch.zeros(x.shape[1], design.shape[1], dtype=x.dtype)
    extra[:, :-1] = penalty**0.5 * torch.eye(x.shape[1], dtype=x.dtype)
    augmented, wanted = torch.cat([root * design, extra]), torch.cat([root * y, y.new_zeros(len(extra), y.shape[1])])
    return torch.linalg.lstsq(augmented, wanted).solution


def scale_of(x: torch.Tensor, weights: torch.Tensor) -> float:
    centred = x - (weights[:, None] * x).sum(0) / weights.sum()
    return float((weights[:, None] * centred.square()).sum() / x.shape[1])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(4, 30), penalty=st.sampled_from([1e-4, 0.1, 3.0]))
def test_the_map_is_penalised_least_squares(seed: int, rows: int, penalty: float) -> None:
    x, y, weights = draw(seed, rows, 6, 3)
    found = ridge_map(x, y, groups=torch.arange(rows), weights=weights, penalties=[penalty])
    solution = affine(x, y, weights, penalty * scale_of(x, weights))
    expected = x @ solution[:-1] + solution[-1]
    torch.testing.assert_close(found(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 12, [3, 1, 2, 3, 3]], ids=["one row", "several rows"])
def test_groups_left_out_are_as_in_refits_and_the_best_penalty_is_chosen(sizes: list[int]) -> None:
    x, y, weights = draw(3, sum(sizes), 9, 2)
    groups = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)])
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    x, y, weights, groups = x[shuffled], y[shuffled], weights[shuffled], groups[shuffled]
    penalties = [1e-3, 0.1, 1.0, 30.0]
    errors = []
    for penalty in penalties:
        error = 0.0
        for group in range(len(sizes)):
            rest, own = groups != group, groups == group
            solution = affine(x[rest], y[rest], weights[rest], penalty * scale_of(x, weights))
            missed = y[own] - x[own] @ solution[:-1] - solution[-1]
            error += float((weights[own, None] * missed.square()).sum())
        errors.append(error)
    found = ridge_map(x, y, groups=groups, weights=weights, penalties=penalties)
    assert found.penalty == penalties[errors.index(min(errors))]
    assert found.left_out == pytest.approx(1 - min(errors) / float((weights[:, None] * y.square()).sum()), rel=1e-6)


def test_rows_left_out_alone_follow_the_formula_of_leave_one_out() -> None:
    hat = torch.tensor([[0.5], [0.1]], dtype=torch.float64)
    residuals = torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    expected = residuals / (1 - hat.square())
    torch.testing.assert_close(left_out_residuals(residuals, hat, torch.tensor([0, 1])), expected)


def products_of(z: torch.Tensor, t: torch.Tensor, weights: torch.Tensor) -> Products:
    found = Products.empty(z.shape[1], t.shape[1])
    for part in torch.arange(len(z)).split(4):
        found.add(z[part], t[part], weights[part])
    return found


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(1, 4), penalty=st.sampled_from([1e-6, 0.05, 1.0]))
def test_the_update_of_a_rank_is_the_best_of_its_rank(seed: int, rank: int, penalty: float) -> None:
    """The oracle: the fitted values of the rows with the penalty's, cut by an SVD."""
    z, t, weights = draw(seed, 20, 6, 4)
    products = products_of(z, t, weights)
    ridge = penalty * float(products.inner.diagonal().mean())
    root = weights.sqrt()[:, None]
    design = torch.cat([root * z, ridge**0.5 * torch.eye(6, dtype=z.dtype)])
    wanted = torch.cat([root * t, t.new_zeros(6, 4)])
    full = torch.linalg.lstsq(design, wanted).solution
    torch.testing.assert_close(solve_ridge(products, penalty), full)
    _, _, vh = torch.linalg.svd(design @ full)
    best = full @ vh[:rank].T @ vh[:rank]
    update = reduced_rank(products, rank=rank, penalty=penalty)
    assert update.rank == rank
    torch.testing.assert_close(update.dense(), best.T, rtol=1e-6, atol=1e-8)


def test_sums_know_the_error_of_any_solution_and_of_mapped_targets() -> None:
    z, t, weights = draw(5, 15, 5, 3)
    generator = torch.Generator().manual_seed(2)
    matrix, solution = (torch.randn(*shape, generator=generator).double() for shape in ((3, 2), (5, 2)))
    mapped = products_of(z, t, weights).mapped(matrix)
    expected = float((weights[:, None] * (t @ matrix - z @ solution).square()).sum())
    assert mapped.error(solution) == pytest.approx(expected)
    assert mapped.square == pytest.approx(float((weights[:, None] * (t @ matrix).square()).sum()))


def test_the_penalty_is_judged_by_parts_that_were_left_out() -> None:
    z, t, weights = draw(7, 18, 12, 2)
    halves = [torch.arange(9), torch.arange(9, 18)]
    parts = [products_of(z[half], t[half], weights[half]) for half in halves]
    penalties = [1e-6, 0.1, 10.0]
    errors = []
    for penalty in penalties:
        error = 0.0
        for own, rest in (halves, halves[::-1]):
            solution = solve_ridge(products_of(z[rest], t[rest], weights[rest]), penalty)
            error += float((weights[own, None] * (t[own] - z[own] @ solution).square()).sum())
        errors.append(error)
    penalty, share = choose_penalty(parts, penalties)
    assert penalty == penalties[errors.index(min(errors))]
    assert share == pytest.approx(1 - min(errors) / float((weights[:, None] * t.square()).sum()))
