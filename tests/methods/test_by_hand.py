"""Every method once in figures that a person can check on paper: the oracles could share a mistake with the code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from adaptermix.algebra import Dense, LowRank, Stack
from adaptermix.methods import METHODS
from adaptermix.methods.base import build

Rows = Sequence[Sequence[float]]

ONE = [[6, -5, 4], [3, -2, 1]]
TWO = [[3, 7, -4], [1, 6, -2]]
"""Of six entries a density of .7 keeps 4 (4.2 rounded down): 6 -5 4 3, and 7 6 -4 3."""
KEPT = {"density": 0.7}

ACROSS, OTHER = [[2.5, 1.5], [1.5, 2.5]], [[-0.5, 2.5], [2.5, -0.5]]
"""4 and 1, and 2 and -3, on the two diagonals of the square: in core space they are diag(4, 1) and diag(2, -3)."""


def stack_of(deltas: Sequence[Rows], weights: Sequence[float], **more: Any) -> Stack:
    updates = tuple(Dense(w=torch.tensor(delta, dtype=torch.float64)) for delta in deltas)
    return Stack(updates=updates, weights=tuple(map(float, weights)), **more)


CASES: list[tuple[str, Mapping[str, Any], Sequence[Rows], Sequence[float], Rows]] = [
    ("exact", {}, [ONE, TWO], [1, 0.5], [[7.5, -1.5, 2], [3.5, 1, 0]]),
    ("svd", {}, [ONE, TWO], [1, 0.5], [[7.5, -1.5, 2], [3.5, 1, 0]]),  # the cut comes after the merge
    ("fuse", {}, [ONE, TWO], [1, 0.5], [[7.5, -1.5, 2], [3.5, 1, 0]]),  # weights that were learned
    ("cat", {}, [ONE, TWO], [1, 0.5], [[7.5, -1.5, 2], [3.5, 1, 0]]),
    ("task-arithmetic", {"gain": 2.0}, [ONE, TWO], [1, -1], [[6, -24, 16], [4, -16, 6]]),
    ("adamergex", {"t": 2.0}, [[[1]], [[10]], [[100]]], [1, 0.5, 0.25], [[1 + 2 * (5 - 25)]]),
    # 6 and 3 agree; -5 and 7 have the sum 2, so 7 stays; 4 and -4 have the sum 0, which counts as +
    ("ties", KEPT, [ONE, TWO], [1, 0.5], [[3.75, 3.5, 4], [3, 3, 0]]),
    ("ties", {**KEPT, "gain": 2.0}, [ONE, TWO], [1, 0.5], [[7.5, 7, 8], [6, 6, 0]]),
    ("ties", {**KEPT, "normalize": False}, [ONE, TWO], [1, 0.5], [[7.5, 3.5, 4], [3, 3, 0]]),
    # with weights first -5 and 3.5 elect -, and 4 and -2 elect +; divided by the weights of those that stay
    ("ties", {**KEPT, "order": "scale-first"}, [ONE, TWO], [1, 0.5], [[5, -5, 4], [3, 6, 0]]),
    (
        "ties",
        {**KEPT, "order": "scale-first", "normalize": False},
        [ONE, TWO],
        [1, 0.5],
        [[7.5, -5, 4], [3, 3, 0]],
    ),
    # a density of .1 keeps none of six entries by rounding down, and one all the same
    ("ties", {"density": 0.1}, [ONE, TWO], [1, 0.5], [[6, 3.5, 0], [0, 0, 0]]),
    # of the two diagonals the largest entries are all 2.5; of their cores 4 and 1 with 2 and -3
    ("ties", {"density": 0.5}, [ACROSS, OTHER], [1, 1], [[2.5, 2.5], [2.5, 2.5]]),
    ("ties", {"density": 0.5, "space": "core"}, [ACROSS, OTHER], [1, 1], [[0, 3], [3, 0]]),
    ("magnitude-prune", KEPT, [ONE, TWO], [1, 0.5], [[7.5, -1.5, 2], [3, 3, 0]]),
    ("magnitude-prune", {"density": 0.25, "space": "core"}, [ACROSS, OTHER], [1, 1], [[0.5, 3.5], [3.5, 0.5]]),
    # one of six (1.2) goes as an outlier, the three after it stay: -5 4 3, and 6 -4 3
    ("breadcrumbs", {"density": 0.5, "outliers": 0.2}, [ONE, TWO], [1, 0.5], [[1.5, -5, 2], [3, 3, 0]]),
    ("breadcrumbs", {"density": 0.5, "outliers": 0.2, "elect": True}, [ONE, TWO], [1, 0.5], [[1.5, -5, 4], [3, 3, 0]]),
    ("breadcrumbs", {"density": 0.25, "outliers": 0.25, "space": "core"}, [ACROSS, OTHER], [1, 1],
     [[1.5, 0.5], [0.5, 1.5]]),  # of 4 and 1 the 1, of 2 and -3 the 2
    ("dare-linear", {"density": 1.0}, [ONE, TWO], [1, 0.5], [[7.5, -1.5, 2], [3.5, 1, 0]]),
    ("dare-ties", {"density": 1.0}, [ONE, TWO], [1, 0.5], [[3.75, 3.5, 4], [1.75, 3, -1]]),
    ("della", {"density": 1.0, "epsilon": 0.0}, [ONE, TWO], [1, 0.5], [[3.75, 3.5, 4], [1.75, 3, -1]]),
    ("della", {"density": 1.0, "epsilon": 0.0, "elect": False}, [ONE, TWO], [1, 0.5], [[7.5, -1.5, 2], [3.5, 1, 0]]),
    # a right angle, a third of the way: W = 1.5 times sin 60 of 2 and sin 30 of 1
    ("slerp", {}, [[[2, 0]], [[0, 1]]], [1, 0.5], [[1.5 * 2 * math.sqrt(0.75), 1.5 * 0.5]]),
    # the direction is 30 degrees from the first, the length 1 * 2 + .5 * 1
    ("karcher", {}, [[[2, 0]], [[0, 1]]], [1, 0.5], [[2.5 * math.sqrt(0.75), 2.5 * 0.5]]),
    # a cosine of 1/2: t = 2 * .5 / 1.5
    ("model-stock", {}, [[[1, 0]], [[0.5, math.sqrt(0.75)]]], [1, 0.5], [[1.25 * 2 / 3, math.sqrt(0.75) / 3]]),
    # [one | two] has orthogonal rows, so its left directions are those of the matrix: ties of the entries
    ("knots", {"density": 0.5}, [[[4, 1], [1, 2]], [[2, 3], [-3, 0]]], [1, 0.5], [[4, 1.5], [-1.5, 2]]),
    # two deltas in two rows have one direction each: 3 of the first, and 2 times .5 of the second
    ("tsv", {}, [[[3, 0], [0, 1]], [[1, 0], [0, 2]]], [1, 0.5], [[3, 0], [0, 1]]),
    ("tsv", {"share": 0.5}, [[[3, 0], [0, 1]]], [1], [[3, 0], [0, 0]]),
    ("tsv", {}, [[[3, 0], [0, 0]], [[2, 0], [0, 0]]], [1, 0.5], [[2, 0], [0, 0]]),  # one direction: (3 + 1) / 2
    ("tsv", {}, [torch.diag(torch.tensor([3.0, 1, 0, 0])).tolist(), torch.diag(torch.tensor([0.0, 0, 2, 0])).tolist()],
     [1, 1], torch.diag(torch.tensor([3.0, 1, 2, 0])).tolist()),
    ("tsv", {"space": "core"},  # three directions in all, so one each
     [torch.diag(torch.tensor([3.0, 1, 0, 0])).tolist(), torch.diag(torch.tensor([0.0, 0, 2, 0])).tolist()],
     [1, 1], torch.diag(torch.tensor([3.0, 0, 2, 0])).tolist()),
    ("iso-c", {}, [[[3, 0], [0, 0]], [[0, 0], [0, -2]]], [1, 0.5], [[2, 0], [0, -2]]),
    ("iso-c", {}, [[[3, 0], [0, 2]], [[0, 0], [0, -2]]], [1, 1], [[3, 0], [0, 0]]),
    ("iso-c", {"space": "core"}, [[[3, 0], [0, 2]], [[0, 0], [0, -2]]], [1, 1], [[1.5, 0], [0, 0]]),
    # both read the first input: averaged there
    ("wudi", {"ridge": 0.0}, [[[4, 0], [0, 0]], [[0, 0], [2, 0]]], [1, 1], [[2, 0], [1, 0]]),
    # columns of lengths 5 and 8, then of 0 and 6; whole deltas of lengths 5 and 10
    ("do-merging", {}, [[[3, 0], [4, 0]], [[0, 6], [8, 0]]], [1, 1], [[3.9, 6], [11.7, 0]]),
    ("do-merging", {"per": "module"}, [[[3, 0], [4, 0]], [[0, 6], [8, 0]]], [1, 1], [[4.5, 4.5], [12, 0]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "deltas", "weights", "expected"), CASES)
def test_a_method_on_a_few_numbers(
    name: str, options: Mapping[str, Any], deltas: Sequence[Rows], weights: Sequence[float], expected: Rows
) -> None:
    stack = stack_of(deltas, weights, seed=0)
    found = build(name, options).fit(lambda: [stack])(stack).dense()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("module", [[[0, 2]], [[0, 4]]]), ("model", [[[0, 0]], [[3, 4]]])],
)
def test_what_ties_trims_module_by_module_and_over_the_model(scope: str, expected: list[Rows]) -> None:
    stacks = [replace(stack_of([delta], [1]), module=f"m{n}") for n, delta in enumerate(([[1, 2]], [[3, 4]]))]
    fitted = build("ties", {"density": 0.5, "scope": scope}).fit(lambda: stacks)
    assert [fitted(stack).dense().tolist() for stack in stacks] == expected


# of two inputs the first matters as much to both adapters (1 and .5 * 2), the second three times as much to the first
IMPORTANCE = [[[1.0, 3.0]], [[2.0, 2.0]]]
COUPLED = [[[1.0, 0.5], [0.5, 3.0]], [[2.0, 1.0], [1.0, 2.0]]]


@pytest.mark.parametrize(
    ("name", "options", "statistics", "expected"),
    [
        ("fisher", {}, IMPORTANCE, [4, 3]),
        ("fisher", {}, [[[0.0, 3.0]], [[0.0, 2.0]]], [(2 + 0.5 * 6) / 1.5, 3]),  # where nothing matters, the mean
        ("regmean", {"off_diagonal": 0.0}, COUPLED, [4, 3]),
        ("regmean", {"off_diagonal": 1.0}, [[[1.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [0.0, 2.0]]], [4, 3]),
        # (2, 2) [[1 .5] [.5 3]] + (6, 6) [[1 .5] [.5 1]] = (12, 16), times the inverse of [[2 1] [1 4]]
        ("regmean", {"off_diagonal": 1.0}, COUPLED, [(4 * 12 - 16) / 7, (2 * 16 - 12) / 7]),
        ("regmean-plus", {"off_diagonal": 0.0}, COUPLED, [4, 3]),
    ],
)
def test_a_method_of_statistics_on_two_numbers(
    name: str, options: Mapping[str, Any], statistics: Sequence[Rows], expected: Sequence[float]
) -> None:
    found = tuple(torch.tensor(one, dtype=torch.float64) for one in statistics)
    stack = stack_of([[[2, 2]], [[6, 6]]], [1, 0.5], statistics=found)
    assert build(name, options)(stack).dense()[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # B = 1 * 1 + .5 * 1, A = 1 * 4 + .5 * 16
        ("peft-linear", 1.5 * 12),
        # B = 1 + .25, A = 4 + .25 * 16
        ("factor-average", 1.25 * 8),
        ("exact", 4 + 0.25 * 16),
    ],
)
def test_methods_of_factors_on_two_numbers(name: str, expected: float) -> None:
    updates = [LowRank(b=torch.ones(1, 1).double(), a=torch.full((1, 1), value).double()) for value in (4.0, 16.0)]
    assert build(name, {})(Stack.of(updates, [1.0, 0.25])).dense().item() == pytest.approx(expected)


LANGUAGE = [1, 1, 0.5, 0, 0, 0, 0.5, 1]


@pytest.mark.parametrize(("block", "share"), list(enumerate(LANGUAGE)))
def test_layer_swap_on_two_numbers(block: int, share: float) -> None:
    stack = replace(stack_of([[[2]], [[10]]], [1, 0.5]), block=block, depth=8)
    found = build("layer-swap", {"bottom": 2, "top": 1})(stack).dense().item()
    assert found == pytest.approx((1 - share) * 2 + share * 5)


@pytest.mark.parametrize(
    ("name", "options", "survivors", "shares"),
    [
        ("dare-linear", {"density": 0.25}, [4, 8, 12], [0.25, 0.25, 0.25]),
        ("dare-ties", {"density": 0.25}, [4, 8, 12], [0.25, 0.25, 0.25]),
        # by size in the row: .5 - .2, .5 and .5 + .2
        ("della", {"density": 0.5, "epsilon": 0.4}, [1 / 0.3, 2 / 0.5, 3 / 0.7], [0.3, 0.5, 0.7]),
    ],
)
def test_what_chance_keeps_and_by_how_much_it_grows(
    name: str, options: Mapping[str, Any], survivors: Sequence[float], shares: Sequence[float]
) -> None:
    """4000 rows of 1, 2 and 3."""
    found = build(name, options)(stack_of([[[1, 2, 3]] * 4000], [1], seed=0)).dense()
    for column, survivor, share in zip(found.T, survivors, shares, strict=True):
        kept = column[column != 0]
        assert kept.unique().tolist() == pytest.approx([survivor])
        assert len(kept) / 4000 == pytest.approx(share, abs=0.03)


def test_every_method_is_in_a_table_above() -> None:
    named = {case[0] for case in CASES}
    assert named | {"fisher", "regmean", "regmean-plus", "peft-linear", "factor-average", "layer-swap"} == set(METHODS)
