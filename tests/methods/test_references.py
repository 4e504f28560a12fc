"""Our methods beside those of peft 0.21.2 and mergekit 0.1.5, where the formulas agree."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaptermix.algebra import Dense, LowRank, Stack, recompress, truncate
from adaptermix.methods.base import build
from adaptermix.testing.stacks import generic

from ..refusals import refuses


def has(package: str, wanted: str) -> bool:
    try:
        return version(package) == wanted
    except PackageNotFoundError:
        return False


needs_peft = pytest.mark.skipif(not has("peft", "0.21.2"), reason="compared with peft 0.21.2")
needs_mergekit = pytest.mark.skipif(not has("mergekit", "0.1.5"), reason="compared with mergekit 0.1.5")
WEIGHTS = [0.9, 0.1, -0.3]


def by_peft(kind: str, weights: Sequence[float], *, seed: int = 0, **options: Any) -> tuple[Stack, Tensor]:
    """Merge random adapters of a 20 x 10 layer with peft; also return them as a stack."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(10, 20)), config, adapter_name="0")
        for i in range(1, len(weights)):
            model.add_adapter(str(i), config)
        layer = model.base_model.model[0]
        generator = torch.Generator().manual_seed(seed)
        for i in range(len(weights)):
            layer.lora_A[str(i)].weight.data = torch.randn(4, 10, generator=generator)
            layer.lora_B[str(i)].weight.data = torch.randn(20, 4, generator=generator)
        names = [str(i) for i in range(len(weights))]
        model.add_weighted_adapter(names, list(weights), "merged", combination_type=kind, **options)
    updates = [
        LowRank(b=layer.lora_B[n].weight.data, a=layer.lora_A[n].weight.data, scale=layer.scaling[n]) for n in names
    ]
    return Stack.of(updates, weights, seed=0), layer.get_delta_weight("merged").detach()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


@needs_peft
@pytest.mark.parametrize(("name", "kind"), [("exact", "cat"), ("peft-linear", "linear")])
def test_sums_agree_with_peft(name: str, kind: str) -> None:
    stack, expected = by_peft(kind, WEIGHTS)
    assert close(build(name, {})(stack).dense(), expected)


@needs_peft
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_svd_agrees_with_peft(rank: int) -> None:
    stack, expected = by_peft("svd", WEIGHTS, svd_rank=rank)
    merged = build("svd", {})(stack)
    assert isinstance(merged, LowRank)
    assert close(recompress(merged, rank)[0].dense(), expected)


@needs_peft
@pytest.mark.parametrize("density", [0.2, 0.5, 0.75])
@pytest.mark.parametrize(("name", "kind"), [("ties", "ties_svd"), ("magnitude-prune", "magnitude_prune_svd")])
def test_trimming_methods_agree_with_peft_where_the_counts_are_whole(name: str, kind: str, density: float) -> None:
    stack, expected = by_peft(kind, WEIGHTS, density=density, svd_rank=4)
    merged = build(name, {"density": density})(stack).dense()
    assert close(truncate(merged, 4).update.dense(), expected, 1e-4)


@needs_peft
def test_dare_agrees_with_peft_in_the_share_that_it_keeps_and_by_how_much_it_enlarges() -> None:
    stack, expected = by_peft("dare_linear_svd", [1.0, 0.0], density=0.5, svd_rank=10)
    ours = build("dare-linear", {"density": 0.5})(stack).dense()
    whole = stack.updates[0].dense()
    for merged in (ours, expected):
        ratio = merged / whole
        assert torch.allclose(ratio, torch.where(ratio > 1, 2.0, 0.0), atol=2e-2)
        assert abs(float((ratio > 1).float().mean()) - 0.5) < 5 * (0.25 / 200) ** 0.5


D = [
    [1.5410, -0.2934, -2.1788, 0.5684, -1.0845, -1.3986],
    [0.4033, 0.8380, -0.7193, -0.4033, -0.5966, 0.1820],
]
FIXTURES: list[tuple[str, dict[str, Any], list[float]]] = [
    ("task-arithmetic", {}, [1.4272, -0.1803, -2.0328, 0.4713, -1.0357, -1.2405]),
    ("ties", {"density": 1.0}, [1.4272, -0.2934, -2.0328, 0.5684, -1.0357, -1.3986]),
    ("ties", {"density": 1.0, "normalize": False}, [1.4272, -0.2641, -2.0328, 0.5116, -1.0357, -1.2587]),
    ("ties", {"density": 0.5}, [1.5410, 0.8380, -2.0328, 0.0, -0.5966, -1.3986]),
    ("breadcrumbs", {"density": 0.5}, [1.3869, 0.0838, -2.0328, 0.0, -0.0597, -1.2587]),
]


@pytest.mark.parametrize(("name", "options", "expected"), FIXTURES)
def test_the_numbers_of_mergekit_that_were_written_down(
    name: str, options: dict[str, Any], expected: list[float]
) -> None:
    options = {**options, **({"order": "scale-first"} if name == "ties" else {})}
    stack = Stack.of([Dense(w=torch.tensor([row], dtype=torch.float64)) for row in D], [0.9, 0.1])
    assert build(name, options)(stack).dense().flatten().tolist() == pytest.approx(expected, abs=1.01e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model-stock", [0.6160, 0.1725, -0.9181, 0.0523, -0.5326, -0.3854]),
        ("karcher", [1.0367, 0.6977, -1.6116, -0.1578, -1.0357, -0.4047]),
    ],
)
def test_the_numbers_of_mergekit_for_methods_without_weights(name: str, expected: list[float]) -> None:
    stack = Stack.of([Dense(w=torch.tensor([row], dtype=torch.float64)) for row in D], [0.5, 0.5])
    assert build(name, {})(stack).dense().flatten().tolist() == pytest.approx(expected, abs=2e-4)


def three(k: int = 3, weights: Sequence[float] = (0.9, 0.1, 0.3), *, acute: bool = False) -> Stack:
    return replace(generic((10, 8), [3] * k, list(weights[:k]), seed=4, acute=acute), seed=0)


SCALE_FIRST = {"order": "scale-first"}
PAIRS: list[tuple[str, dict[str, Any], str, dict[str, Any], Stack]] = [
    ("task-arithmetic", {}, "task_arithmetic", {}, three()),
    ("task-arithmetic", {}, "task_arithmetic", {}, three(weights=WEIGHTS)),
    ("breadcrumbs", {"density": 0.5, "outliers": 0.1}, "breadcrumbs", {"density": 0.5, "gamma": 0.1}, three()),
    (
        "breadcrumbs",
        {"density": 0.5, "outliers": 0.1, "elect": True},
        "breadcrumbs_ties",
        {"density": 0.5, "gamma": 0.1},
        three(),
    ),
    ("model-stock", {}, "model_stock", {}, three(weights=[1 / 3] * 3, acute=True)),
    ("karcher", {}, "karcher", {}, three(weights=[1 / 3] * 3, acute=True)),
    ("slerp", {}, "slerp", {"t": 0.25}, three(2, [0.75, 0.25])),
    *(
        ("ties", SCALE_FIRST | {"density": d, "normalize": n}, "ties", {"density": d, "normalize": n}, three())
        for d in (1.0, 0.5, 0.25)
        for n in (True, False)
    ),
]


@needs_mergekit
@pytest.mark.parametrize(("ours", "options", "theirs", "parameters", "stack"), PAIRS)
def test_deterministic_methods_agree_with_mergekit(
    ours: str, options: dict[str, Any], theirs: str, parameters: dict[str, Any], stack: Stack
) -> None:
    expected = build(f"mergekit:{theirs}", parameters)(stack).dense()
    assert close(build(ours, options)(stack).dense(), expected, 1e-4)


@needs_mergekit
def test_nuslerp_is_slerp_of_the_directions() -> None:
    """mergekit's nuslerp interpolates unit vectors, and gives back a length between the two."""
    stack = three(2, [0.5, 0.5])
    units = tuple(Dense(w=u.dense() / u.dense().norm()) for u in stack.updates)
    stack = replace(stack, updates=units)
    expected = build("mergekit:nuslerp", {})(stack).dense()
    assert close(build("slerp", {})(stack).dense(), expected, 1e-4)


def members() -> list[str]:
    from adaptermix.methods.mergekit import mergekit_methods

    return sorted(mergekit_methods()) if has("mergekit", "0.1.5") else []


@needs_mergekit
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("member", members())
def test_every_method_of_mergekit_runs_or_refuses_in_one_line_and_leaves_random_states_alone(
    member: str, count: int
) -> None:
    from adaptermix.methods.mergekit import mergekit_methods

    needed = {name: 0.5 for name, default in mergekit_methods()[member].items() if default is ...}
    method, stack = build(f"mergekit:{member}", needed), three(count, [1 / count] * 3)
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    refused = ""
    try:
        merged = [method(stack).dense() for _ in range(2)]
    except ValueError as error:
        refused = str(error)
    if refused:
        assert len(refused.splitlines()) == 1
        assert count != 2 or member == "passthrough"
    else:
        assert merged[0].shape == stack.shape
        assert torch.isfinite(merged[0]).all()
        assert torch.equal(merged[0], merged[1])
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert states[2] == np.random.get_state()[1].tolist()


@needs_mergekit
def test_a_method_of_mergekit_that_wants_an_option_says_so() -> None:
    with refuses("mergekit.option-missing: nearswap.*'t'.*t"):
        build("mergekit:nearswap", {})
    with refuses(r"mergekit.unknown-option: Did you mean 'density'\?"):
        build("mergekit:ties", {"densty": 0.5})
    with refuses(r"mergekit.unknown: Did you mean 'ties'\?"):
        build("mergekit:teis", {})


@needs_mergekit
def test_unequal_weights_are_refused_by_a_method_that_takes_none() -> None:
    with refuses("mergekit.equal-weights"):
        build("mergekit:karcher", {})(three())
