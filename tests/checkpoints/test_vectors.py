"""Norms and biases of checkpoints: vectors, which methods for matrices leave to plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix import merge_checkpoints
from adaptermix.errors import PlanError

from ..analysis.models import write_model
from ..refusals import refuses
from .models import tensors_of

SHAPES = {"norm.weight": (32,), "proj.weight": (16, 32), "proj.bias": (16,), "conv.weight": (8, 4, 3), "scale": ()}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path], list[dict[str, Tensor]]]:
    """A base, two models tuned from it, and their deltas."""
    generator = torch.Generator().manual_seed(0)
    own = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    deltas = [{name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(2)]
    base = write_model(tmp_path / "base", own)
    tuned = [
        write_model(tmp_path / f"model{i}", {name: own[name] + delta[name] for name in own})
        for i, delta in enumerate(deltas)
    ]
    return base, tuned, deltas


def merged(models: Any, tmp_path: Path, method: str, weights: list[float], **more: Any) -> dict[str, Tensor]:
    base, tuned, _ = models
    merge_checkpoints(base, tuned, weights, method=method, out=tmp_path / "out", overwrite=True, **more)
    own, found = tensors_of(base), tensors_of(tmp_path / "out")
    return {name: found[name] - own[name] for name in found}


def test_tsv_adds_vectors_up(models: Any, tmp_path: Path) -> None:
    """The paper leaves what is no matrix to plain arithmetic; as [n 1] columns vectors shrank by sqrt(k)."""
    found = merged(models, tmp_path, "tsv", [0.6, 0.3], options={"gain": 1.5})
    for name in ("norm.weight", "proj.bias", "scale"):
        expected = 1.5 * (0.6 * models[2][0][name] + 0.3 * models[2][1][name])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_tsv_reports_what_it_cuts_of_matrices(models: Any, tmp_path: Path) -> None:
    """Of a matrix of 16 x 32 the paper keeps 16 / 2 = 8 singular values of each model."""
    base, tuned, deltas = models
    report = merge_checkpoints(base, tuned, [0.6, 0.3], method="tsv")
    values = [
        torch.linalg.svdvals(delta["proj.weight"].double()) * w for delta, w in zip(deltas, (0.6, 0.3), strict=True)
    ]
    lost = sum(float(s[8:].square().sum()) for s in values) / sum(float(s.square().sum()) for s in values)
    assert report.modules["proj.weight"].residual == pytest.approx(lost**0.5, rel=1e-4)
    assert report.modules["norm.weight"].residual == 0.0


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_of_mergekit_merges_checkpoints_with_norms_and_biases(models: Any, tmp_path: Path, method: str) -> None:
    pytest.importorskip("mergekit")
    base, tuned, deltas = models
    options = {"density": 0.5, "epsilon": 0.4, "rescale": False, "normalize": False}
    shapes = {name: shape for name, shape in SHAPES.items() if shape}
    for folder in (base, *tuned):
        tensors = {name: tensor for name, tensor in tensors_of(folder).items() if name in shapes}
        write_model(tmp_path / f"{folder.name}_", tensors)
    again = [tmp_path / f"{folder.name}_" for folder in (base, *tuned)]
    found = merged((again[0], again[1:], deltas), tmp_path, f"mergekit:{method}", [0.5, 0.5], options=options)
    for name in shapes:
        one, other = (0.5 * delta[name] for delta in deltas)
        candidates = torch.stack([one * 0, one, other, one + other])
        error = (candidates - found[name]).abs().min(0).values
        assert float(error.max()) < 1e-5  # every entry is a sum of some of the two
        assert 0.2 < float((found[name].abs() > 1e-6).float().mean()) < 1.0


def test_a_tensor_that_a_method_refuses_is_named_with_the_whole_method(models: Any) -> None:
    pytest.importorskip("mergekit")
    base, tuned, _ = models
    words = (
        r"method 'mergekit:della', tensor 'scale': it ranks the entries of a row, and rows of \[1\] have one entry\.$"
    )
    with pytest.raises(PlanError, match=words):
        merge_checkpoints(base, tuned, [0.5, 0.5], method="mergekit:della", options={"density": 0.5})


@pytest.mark.parametrize(
    "method", ["linear", "karcher", "multislerp", "model_stock", "nuslerp", "sce", "ties", "breadcrumbs_ties"]
)
def test_methods_of_mergekit_get_tensors_in_their_own_shape(models: Any, tmp_path: Path, method: str) -> None:
    """mergekit on deltas with zeros as the base model, tensor by tensor."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    options: dict[str, Any] = {"nuslerp": {"nuslerp_flatten": False}, "model_stock": {"filter_wise": True}}.get(
        method, {}
    )
    found = merged(models, tmp_path, f"mergekit:{method}", [0.5, 0.5], options=options)
    for name, delta in found.items():
        if not SHAPES[name]:
            continue
        tensors, base = [d[name] for d in models[2]], None
        if method not in ("linear", "karcher", "multislerp", "nuslerp"):
            tensors, base = [torch.zeros_like(tensors[0]), *tensors], 0
        weight = {} if method in ("karcher", "model_stock", "sce") else {"weight": [0.5, 0.5]}
        expected = api.merge_tensors(tensors, method, parameters={**options, **weight}, base_index=base)
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-5)


def test_draws_do_not_depend_on_the_order_of_the_models(models: Any, tmp_path: Path) -> None:
    base, tuned, deltas = models
    one = merged(models, tmp_path, "dare-linear", [0.7, 0.3])
    other = merged((base, tuned[::-1], deltas), tmp_path, "dare-linear", [0.3, 0.7])
    for name, delta in one.items():
        torch.testing.assert_close(other[name], delta, rtol=1e-4, atol=1e-6)


def test_a_method_that_learns_is_refused(models: Any) -> None:
    base, tuned, _ = models
    with refuses("checkpoint.learned-method: fuse"):
        merge_checkpoints(base, tuned, [0.5, 0.5], method="fuse")
