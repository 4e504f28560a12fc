"""Every method against the slow float64 loops, of adapters that are zero, copies, in 16 bits, or cancel each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adaptermix.algebra import LowRank, Stack
from adaptermix.methods import METHODS
from adaptermix.methods.base import build
from adaptermix.testing.stacks import generic, with_statistics

from ..refusals import refuses
from . import oracles
from .oracles import Matrix
from .test_oracles import draws_of

SHAPE = (9, 7)
Oracle = Callable[[Stack, list[Matrix], Sequence[float]], Matrix]


def total(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    return np.asarray(sum(w * d for w, d in zip(weights, deltas, strict=True)))


def acting(deltas: Sequence[Matrix], weights: Sequence[float]) -> tuple[list[Matrix], list[float]]:
    pairs = [(d, w) for d, w in zip(deltas, weights, strict=True) if d.any()]
    return [d for d, _ in pairs], [w for _, w in pairs]


def by_angle(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Slerp; a straight line where there is no angle, or none to speak of."""
    one, other = deltas
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    if lengths == 0 or abs(float((one * other).sum())) / lengths > 0.9995:
        return total(deltas, weights)
    return sum(weights) * oracles.slerp(one, other, weights[1] / sum(weights))


def karcher(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    found, own = acting(deltas, weights)
    return oracles.karcher(found, own) if len(found) > 1 else total(deltas, weights)


def model_stock(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    found, own = acting(deltas, weights)
    return oracles.model_stock(found, own) if len(found) > 1 else total(deltas, weights)


def dropped(stack: Stack, deltas: Sequence[Matrix]) -> list[Matrix]:
    return [d * (u < 0.5) / 0.5 for d, u in zip(deltas, draws_of(stack), strict=True)]


def della(stack: Stack, deltas: Sequence[Matrix]) -> list[Matrix]:
    chances = [oracles.della_chances(delta, 0.5, 0.15) for delta in deltas]
    return [d * (u < p) / p for d, u, p in zip(deltas, draws_of(stack), chances, strict=True)]


def regmean(stack: Stack, deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    roots = [np.linalg.cholesky(gram.double().numpy()).T for gram in stack.statistics]
    return oracles.regmean(deltas, weights, roots)


ORACLES: dict[str, tuple[dict[str, Any], Oracle]] = {
    "exact": ({}, lambda _, d, w: total(d, w)),
    "svd": ({}, lambda _, d, w: total(d, w)),
    "fuse": ({}, lambda _, d, w: total(d, w)),
    "task-arithmetic": ({"gain": 0.7}, lambda _, d, w: 0.7 * total(d, w)),
    "cat": ({}, lambda _, d, w: total(d, w)),
    "layer-swap": (
        {"bottom": 3, "top": 1, "share": 0.3},  # block 3 of 8 is the one after the border
        lambda _, d, w: 0.7 * w[0] * d[0] + 0.3 * w[1] * d[1],
    ),
    "adamergex": ({"t": 0.7}, lambda _, d, w: w[0] * d[0] + 0.7 * (w[1] * d[1] - w[2] * d[2])),
    "wudi": ({"ridge": 0.1}, lambda _, d, w: oracles.wudi(d, w, 0.1)),
    "do-merging": ({}, lambda _, d, w: oracles.do_merging(d, w, "column")),
    "ties": (
        {"density": 0.4},
        lambda _, d, w: oracles.consensus([oracles.trim(x, 0.4) for x in d], w, "elect-first", True),
    ),
    "magnitude-prune": ({"density": 0.4}, lambda _, d, w: total([oracles.trim(x, 0.4) for x in d], w)),
    "breadcrumbs": (
        {"density": 0.4, "outliers": 0.1},
        lambda _, d, w: total([oracles.trim(x, 0.4, 0.1) for x in d], w),
    ),
    "dare-linear": ({"density": 0.5}, lambda s, d, w: total(dropped(s, d), w)),
    "dare-ties": ({"density": 0.5}, lambda s, d, w: oracles.consensus(dropped(s, d), w, "elect-first", True)),
    "della": ({"density": 0.5}, lambda s, d, w: oracles.consensus(della(s, d), w, "elect-first", True)),
    "slerp": ({}, lambda _, d, w: by_angle(d, w)),
    "karcher": ({}, lambda _, d, w: karcher(d, w)),
    "model-stock": ({}, lambda _, d, w: model_stock(d, w)),
    "knots": ({"density": 0.4}, lambda _, d, w: oracles.knots(d, w, 0.4, "elect-first")),
    "tsv": ({}, lambda _, d, w: oracles.tsv(d, w, None)),
    "iso-c": ({}, lambda _, d, w: oracles.iso_c(d, w)),
    "fisher": ({}, lambda s, d, w: oracles.fisher(d, w, [x.numpy() for x in s.statistics])),
    "regmean": ({"off_diagonal": 1.0}, regmean),
    "regmean-plus": ({"off_diagonal": 1.0}, regmean),  # by the inputs that it is given
}
FACTORS = ("peft-linear", "factor-average")
"""Sums of factors, no functions of the deltas: held to their formulas in `test_oracles.py`."""


def stack_for(name: str) -> Stack:
    weights = [0.9, 0.4] if name in ("slerp", "layer-swap") else [0.9, 0.4, 0.3]
    acute = name == "karcher"
    stack = replace(generic(SHAPE, [2] * len(weights), weights, seed=8, acute=acute), seed=3)
    return with_statistics(stack, METHODS[name].statistics)


def low(stack: Stack, place: int = 0) -> LowRank:
    update = stack.updates[place]
    assert isinstance(update, LowRank)
    return update


def with_second(stack: Stack, update: LowRank) -> Stack:
    return replace(stack, updates=(stack.updates[0], update, *stack.updates[2:]))


def in_bfloat16(stack: Stack) -> Stack:
    halves = [low(stack, i) for i in range(len(stack.updates))]
    return replace(stack, updates=tuple(LowRank(b=u.b.bfloat16(), a=u.a.bfloat16(), scale=u.scale) for u in halves))


KINDS: dict[str, Callable[[Stack], Stack]] = {
    "as they are": lambda s: s,
    "zero": lambda s: with_second(s, LowRank(b=0 * low(s, 1).b, a=low(s, 1).a)),
    "all but one zero": lambda s: replace(s, updates=(s.updates[0], *(u * 0.0 for u in s.updates[1:]))),
    "a copy": lambda s: with_second(s, low(s)),
    "in bfloat16": in_bfloat16,
    "the first taken away again": lambda s: replace(
        with_second(s, LowRank(b=low(s).b, a=-low(s).a, scale=low(s).scale)), weights=(0.5, 0.5, *s.weights[2:])
    ),
}
UNDEFINED = {
    ("knots", "the first taken away again"),
    ("iso-c", "the first taken away again"),
    ("karcher", "the first taken away again"),
}
"""Where signs and directions are those of rounding, or there is no mean of two opposite directions."""


def test_every_method_has_an_oracle() -> None:
    assert {*ORACLES, *FACTORS} == set(METHODS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORACLES)
def test_a_method_is_its_papers_formula(name: str, kind: str) -> None:
    if (name, kind) in UNDEFINED:
        pytest.skip("not defined")
    options, oracle = ORACLES[name]
    stack = KINDS[kind](stack_for(name))
    method = build(name, options)
    found = method.fit(lambda: [stack])(stack).dense().double().numpy()
    wide = [update.to(torch.float64).dense().numpy() for update in stack.updates]
    expected = oracle(stack, wide, list(stack.weights))
    tolerance = 1e-4 if kind == "in bfloat16" else 1e-8
    size = sum(abs(w) * float(np.linalg.norm(d)) for w, d in zip(stack.weights, wide, strict=True))
    assert float(np.linalg.norm(found - expected)) <= tolerance * size


def test_opposite_directions_have_no_karcher_mean() -> None:
    stack = KINDS["the first taken away again"](stack_for("slerp"))
    with refuses("method.cancel"):
        build("karcher", {})(stack)
