"""Core space: merging the small matrices that all adapters are in common bases, against the dense computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adaptermix import merge, merge_checkpoints
from adaptermix.algebra import LowRank, Stack, core_of
from adaptermix.algebra.draws import uniform
from adaptermix.methods.base import build
from adaptermix.testing.stacks import generic

from ..checkpoints.models import tensors_of, tune
from ..factories import adapter_deltas, load_base, peft_kind, tiny_llama, write_lora
from ..refusals import refuses
from . import oracles
from .oracles import Matrix

WEIGHTS = [0.9, -0.4, 0.3]
SHAPES = [(9, 7), (7, 9), (12, 5), (3, 4)]


def stack_of(shape: tuple[int, int], ranks: Sequence[int] = (1, 3, 2)) -> Stack:
    return replace(generic(shape, list(ranks), WEIGHTS, seed=sum(shape)), seed=3)


def deltas_of(stack: Stack) -> list[Matrix]:
    return [update.dense().double().numpy() for update in stack.updates]


def basis(matrix: Matrix) -> Matrix:
    u, sigma, _ = np.linalg.svd(matrix, full_matrices=False)
    u = u[:, : int((sigma > 1e-10 * sigma[0]).sum())]
    return np.asarray(u * np.where(u[np.abs(u).argmax(0), np.arange(u.shape[1])] < 0, -1.0, 1.0))


def reference(stack: Stack, merge_cores: Callable[[list[Matrix]], Matrix]) -> Matrix:
    """The paper's construction on dense matrices: project on both bases, merge there, and go back."""
    deltas = deltas_of(stack)
    left, right = basis(np.concatenate(deltas, axis=1)), basis(np.concatenate(deltas).T)
    return np.asarray(left @ merge_cores([left.T @ delta @ right for delta in deltas]) @ right.T)


def total(parts: Sequence[Matrix]) -> Matrix:
    return np.asarray(sum(w * part for w, part in zip(WEIGHTS, parts, strict=True)))


def dropped(stack: Stack, parts: Sequence[Matrix]) -> list[Matrix]:
    draws = [
        uniform(3, name, stack.module, first=0, shape=part.shape) for name, part in zip(stack.names, parts, strict=True)
    ]
    return [part * (draw.double().numpy() < 0.5) / 0.5 for part, draw in zip(parts, draws, strict=True)]


ORACLES: dict[str, tuple[dict[str, Any], Callable[[Stack, list[Matrix]], Matrix]]] = {
    "ties": (
        {"density": 0.4},
        lambda _, m: oracles.consensus([oracles.trim(x, 0.4) for x in m], WEIGHTS, "elect-first", normalize=True),
    ),
    "magnitude-prune": ({"density": 0.4}, lambda _, m: total([oracles.trim(x, 0.4) for x in m])),
    "breadcrumbs": (
        {"density": 0.4, "outliers": 0.1},
        lambda _, m: total([oracles.trim(x, 0.4, 0.1) for x in m]),
    ),
    "dare-linear": ({"density": 0.5}, lambda s, m: total(dropped(s, m))),
    "dare-ties": (
        {"density": 0.5},
        lambda s, m: oracles.consensus(dropped(s, m), WEIGHTS, "elect-first", normalize=True),
    ),
    "tsv": ({}, lambda _, m: oracles.tsv(m, WEIGHTS, None)),
    "iso-c": ({}, lambda _, m: oracles.iso_c(m, WEIGHTS)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ORACLES)
def test_a_method_in_core_space_is_its_formula_between_the_common_bases(name: str, shape: tuple[int, int]) -> None:
    options, oracle = ORACLES[name]
    stack = stack_of(shape)
    expected = reference(stack, lambda parts: oracle(stack, parts))
    method = build(name, {**options, "space": "core"})
    found = method.fit(lambda: [stack])(stack)
    assert isinstance(found, LowRank)
    assert np.linalg.norm(found.dense().numpy() - expected) <= 1e-9 * (1 + np.linalg.norm(expected))
    assert found.rank <= min(*shape, 6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_core_holds_every_update_whole(shape: tuple[int, int]) -> None:
    stack = stack_of(shape)
    core = core_of(stack.updates)
    for part, delta in zip(core.parts, deltas_of(stack), strict=True):
        again = core.left.numpy() @ part.numpy() @ core.right.numpy().T
        assert np.linalg.norm(again - delta) <= 1e-12 * np.linalg.norm(delta)
    for side in (core.left, core.right):
        assert torch.allclose(side.T @ side, torch.eye(side.shape[1], dtype=torch.float64), atol=1e-12)
        assert side.shape[1] <= 6


def test_the_core_of_copies_is_no_larger_than_that_of_one() -> None:
    first = stack_of((9, 7)).updates[0]
    core = core_of([first, first * -2.0, first])
    assert core.parts[0].shape == (1, 1)
    assert float(core.parts[1]) == pytest.approx(-2 * float(core.parts[0]))


def test_the_core_of_nothing_is_one_zero() -> None:
    core = core_of([LowRank(b=torch.zeros(4, 2), a=torch.ones(2, 3))])
    assert core.parts[0].tolist() == [[0.0]]


@pytest.mark.parametrize("name", ["dare-linear", "magnitude-prune"])
def test_a_sum_in_core_space_is_the_exact_sum(name: str) -> None:
    stack = stack_of((30, 20), ranks=(4, 2, 5))
    found = build(name, {"density": 1.0, "space": "core"})(stack)
    expected = build("exact", {})(stack)
    assert torch.allclose(found.dense(), expected.dense(), rtol=0, atol=1e-12 * float(expected.dense().norm()))


def test_tsv_in_core_space_cuts_only_the_longer_ones() -> None:
    stack = generic((40, 40), [1, 5], [1.0, 1.0], seed=1)
    cut = build("tsv", {"space": "core"}).measured(stack)[1]
    assert build("tsv", {}).measured(stack)[1] == 0
    sigma = torch.linalg.svdvals(stack.updates[1].dense())
    whole = torch.cat([sigma, torch.linalg.svdvals(stack.updates[0].dense())[:1]])
    assert cut == pytest.approx(
        float(sigma[3:5].norm() / whole[torch.tensor([0, 1, 2, 3, 4, -1])].norm())
    )  # of 6 / 2 = 3
    equal = generic((40, 40), [3, 3], [1.0, 1.0], seed=1)
    found, whole_result = (build("tsv", {"space": space})(equal).dense() for space in ("core", "full"))
    assert torch.equal(found, whole_result)


def test_iso_c_in_core_space_counts_directions_that_cancel() -> None:
    first, second = generic((9, 7), [2, 1], [1.0, 1.0], seed=2).updates
    stack = Stack.of([first, second, first * -1.0])
    found, plain = (build("iso-c", {"space": space})(stack).dense() for space in ("core", "full"))
    assert torch.allclose(found * 3, plain)


def test_biases_and_vectors_are_merged_as_they_are() -> None:
    stack = generic((7, 1), [1, 1], [1.0, 0.5], seed=4)
    found, plain = (build("ties", {"density": 0.5, "space": space})(stack).dense() for space in ("core", "full"))
    assert torch.equal(found, plain)


MODULES = {"layers.0.q": (24, 16, 3), "layers.1.q": (16, 24, 2)}


@pytest.mark.parametrize("method", ["ties", "dare-ties", "dare-linear", "magnitude-prune", "della", "breadcrumbs"])
def test_an_adapter_of_low_rank_is_written_without_a_cut(method: str, tmp_path: Path) -> None:
    write_lora(tmp_path / "task", MODULES, seed=1)
    write_lora(tmp_path / "align", {"layers.0.q": (24, 16, 5)}, seed=2)
    folders = [tmp_path / "task", tmp_path / "align"]
    report = merge(folders, weights=[0.6, 0.4], method=method, options={"space": "core"}, out=tmp_path / "out")
    assert {module: found.residual for module, found in report.modules.items()} == dict.fromkeys(MODULES, 0.0)
    assert {module: found.rank for module, found in report.modules.items()} == {"layers.0.q": 8, "layers.1.q": 2}
    again = merge(folders, weights=[0.6, 0.4], method=method, options={"space": "core"}, rank=2, max_residual=1)
    assert {found.rank for found in again.modules.values()} == {2}
    assert again.modules["layers.0.q"].residual > 0


def test_the_reported_residual_of_a_cut_is_that_of_the_file(tmp_path: Path) -> None:
    write_lora(tmp_path / "task", MODULES, seed=1)
    write_lora(tmp_path / "align", MODULES, seed=2)
    folders, core = [tmp_path / "task", tmp_path / "align"], {"space": "core"}
    merge(folders, weights=[0.6, 0.4], method="ties", options=core, out=tmp_path / "whole")
    report = merge(
        folders,
        weights=[0.6, 0.4],
        method="ties",
        options=core,
        rank=2,
        max_residual=1,
        out=tmp_path / "cut",
        dtype="bfloat16",
    )
    whole, cut = adapter_deltas(tmp_path / "whole"), adapter_deltas(tmp_path / "cut")
    for module, found in report.modules.items():
        lost = float((whole[module] - cut[module]).norm() / whole[module].norm())
        assert found.residual == pytest.approx(lost, rel=1e-2)


def test_full_space_is_named_where_a_cut_is_refused(tmp_path: Path) -> None:
    write_lora(tmp_path / "task", MODULES, seed=1)
    write_lora(tmp_path / "align", MODULES, seed=2)
    folders = [tmp_path / "task", tmp_path / "align"]
    for space, forms in (("full", "residual.truncation: dense"), ("core", "residual.truncation: concat or dense")):
        with refuses(forms):
            merge(folders, weights=[0.5], method="ties", options={"space": space}, rank=1, max_residual=0.01)


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["embed_tokens", "v_proj"]}, {"target_modules": ["q_proj"], "lora_bias": True}]
)
def test_embeddings_and_biases_inside_are_merged_too(settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    folders = [peft_kind(load_base(base), tmp_path / str(seed), seed=seed, r=3, **settings) for seed in (0, 1)]
    density = {"density": 1.0, "space": "core"}
    one = merge(folders, weights=[0.7, 0.3], method="dare-linear", options=density, out=tmp_path / "core")
    merge(folders, weights=[0.7, 0.3], out=tmp_path / "exact")
    assert one.residual == 0
    found, expected = adapter_deltas(tmp_path / "core"), adapter_deltas(tmp_path / "exact")
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        assert torch.allclose(found[module], delta, atol=1e-6)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("core", "exact")]
    for name, bias in files[1].items():
        if name.endswith("bias"):
            assert torch.allclose(files[0][name], bias, atol=1e-6)


def test_whole_checkpoints_merge_in_their_core_as_well(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    models = [tune(base, tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other"))]
    options = {"density": 1.0, "space": "core"}
    merge_checkpoints(base, models, [0.6, 0.4], method="dare-linear", options=options, out=tmp_path / "core")
    merge_checkpoints(base, models, [0.6, 0.4], out=tmp_path / "sum")
    found, expected = (tensors_of(tmp_path / name) for name in ("core", "sum"))
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-5)
