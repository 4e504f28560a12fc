"""merge: adapter folders in, one adapter folder out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptermix.adapters import open_adapter
from adaptermix.errors import PlanError
from adaptermix.merging import MergePlan, merge, resolve_weights
from adaptermix.methods.exact import Exact

from ..factories import CONFIG, WEIGHTS, adapter_deltas, contents, write_lora
from ..refusals import refuses

Q0, Q1, V0 = "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj", "model.layers.0.attn.v_proj"
MODULES = {Q0: (6, 5, 2), Q1: (6, 5, 2), V0: (4, 5, 2)}


def pair(folder: Path, **other: Any) -> list[Path]:
    """Two adapters of one base, `task` and `align`; keyword arguments change the second."""
    write_lora(folder / "task", MODULES, alpha=8, seed=1)
    write_lora(folder / "align", MODULES, **{"alpha": 4, "seed": 2} | other)
    return [folder / "task", folder / "align"]


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(got) == set(expected)
    for module, delta in expected.items():
        assert (got[module] - delta).norm() <= tolerance * delta.norm(), module


class TestDelta:
    def test_it_is_the_weighted_sum_of_unequal_adapters(self, tmp_path: Path) -> None:
        """Other ranks, alphas, rsLoRA, target modules, dtypes."""
        parts = {
            "task": write_lora(tmp_path / "task", {Q0: (6, 5, 2), Q1: (6, 5, 3)}, alpha=16, seed=1),
            "align": write_lora(
                tmp_path / "align",
                {Q0: (6, 5, 4), V0: (4, 5, 1)},
                alpha={Q0: 3, V0: 0.5},
                rslora=True,
                seed=2,
                dtype=torch.bfloat16,
            ),
            "style": write_lora(tmp_path / "style", {V0: (4, 5, 7)}, alpha=7, seed=3, dtype=torch.float16),
        }
        weights = [0.9, -0.3, 2.0]
        merge([tmp_path / name for name in parts], weights=weights, out=tmp_path / "out")
        expected: dict[str, Tensor] = {}
        for weight, deltas in zip(weights, parts.values(), strict=True):
            for module, delta in deltas.items():
                expected[module] = expected.get(module, 0) + weight * delta
        close(adapter_deltas(tmp_path / "out"), expected)
        out = open_adapter(tmp_path / "out")
        assert {module: out.rank(module) for module in out.modules} == {Q0: 6, Q1: 3, V0: 8}
        assert {header.rank for header in out.modules.values()} == {8}

    def test_one_adapter_with_weight_one_is_itself(self, tmp_path: Path) -> None:
        exact = write_lora(tmp_path / "task", MODULES, alpha=5, rslora=True)
        merge([tmp_path / "task"], weights=[1.0], out=tmp_path / "out")
        close(adapter_deltas(tmp_path / "out"), exact)

    def test_merging_in_two_steps_is_merging_at_once(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        write_lora(tmp_path / "style", MODULES, seed=3)
        merge(paths, weights=[0.5, 0.25], out=tmp_path / "half")
        merge([tmp_path / "half", tmp_path / "style"], weights=[2.0, 1.0], out=tmp_path / "steps")
        merge([*paths, tmp_path / "style"], weights=[1.0, 0.5, 1.0], out=tmp_path / "once")
        close(adapter_deltas(tmp_path / "steps"), adapter_deltas(tmp_path / "once"))

    def test_a_rank_gives_the_best_approximation_of_that_rank(self, tmp_path: Path) -> None:
        report = merge(pair(tmp_path), weights=[0.7, 0.3], rank=3, max_residual=1.0, out=tmp_path / "out")
        merge(pair(tmp_path), weights=[0.7, 0.3], out=tmp_path / "full")
        expected, lost = {}, {}
        for module, delta in adapter_deltas(tmp_path / "full").items():
            u, sigma, vh = torch.linalg.svd(delta, full_matrices=False)
            expected[module] = u[:, :3] @ torch.diag(sigma[:3]) @ vh[:3]
            lost[module] = float(sigma[3:].norm())
            assert report.modules[module].rank == 3
            assert report.modules[module].norm == pytest.approx(float(delta.norm()), rel=1e-6)
            assert report.modules[module].residual == pytest.approx(lost[module] / float(delta.norm()), abs=1e-6)
        close(adapter_deltas(tmp_path / "out"), expected, 1e-5)
        whole = math.hypot(*(float(delta.norm()) for delta in adapter_deltas(tmp_path / "full").values()))
        assert report.norm == pytest.approx(whole, rel=1e-6)
        assert report.residual == pytest.approx(math.hypot(*lost.values()) / whole, abs=1e-6)

    @pytest.mark.parametrize("rank", [4, 100])
    def test_a_rank_at_or_above_what_exists_loses_nothing(self, tmp_path: Path, rank: int) -> None:
        report = merge(pair(tmp_path), weights=[0.7, 0.3], rank=rank, max_residual=1.0, out=tmp_path / "out")
        merge(pair(tmp_path), weights=[0.7, 0.3], out=tmp_path / "full")
        assert report.residual == 0.0
        close(adapter_deltas(tmp_path / "out"), adapter_deltas(tmp_path / "full"))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_rounds_once_when_stored(self, tmp_path: Path, dtype: str) -> None:
        report = merge(pair(tmp_path), weights=[0.9], out=tmp_path / "half", dtype=dtype)
        full = merge(pair(tmp_path), weights=[0.9], out=tmp_path / "full")
        assert report.norm == pytest.approx(full.norm, rel=1e-6)
        half = load_file(tmp_path / "half" / WEIGHTS)
        for name in (name for name in half if ".lora_A." in name):
            assert {half[name].dtype, half[name.replace("lora_A", "lora_B")].dtype} == {getattr(torch, dtype)}
            # Both factors of a rank are of one length, so that neither leaves the range before the other.
            lengths = half[name.replace("lora_A", "lora_B")].double().norm(dim=0) / half[name].double().norm(dim=1)
            assert ((lengths >= 0.49) & (lengths <= 2.04) | lengths.isnan()).all()
        exact = adapter_deltas(tmp_path / "full")
        for module, delta in adapter_deltas(tmp_path / "half").items():
            lost = float((delta - exact[module]).norm() / exact[module].norm())
            assert 0 < lost < torch.finfo(getattr(torch, dtype)).eps / 2
            assert report.modules[module].residual == pytest.approx(lost, rel=1e-3)

    def test_adapters_that_cancel_give_a_delta_of_zero(self, tmp_path: Path) -> None:
        write_lora(tmp_path / "task", MODULES, alpha=8)
        report = merge([tmp_path / "task"] * 2, weights=[1.0, -1.0], out=tmp_path / "out", rank=1)
        for delta in adapter_deltas(tmp_path / "out").values():
            assert delta.norm() <= 1e-6
        assert report.norm <= 1e-6
        assert report.sign_conflict == 1.0
        assert [module.residual for module in report.modules.values()] == [0.0] * len(MODULES)

    def test_weights_of_zero_give_a_delta_of_zero_that_loads(self, tmp_path: Path) -> None:
        report = merge(pair(tmp_path), weights=[0.0, 0.0], out=tmp_path / "out", rank=1)
        assert (report.norm, report.residual, report.sign_conflict) == (0.0, 0.0, 0.0)
        for update in open_adapter(tmp_path / "out").read().updates.values():
            assert not update.dense().any()

    def test_inputs_are_not_changed(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        before = contents(tmp_path)
        merge(paths, weights=[0.9], rank=1, max_residual=1.0)
        assert contents(tmp_path) == before


class TestTargets:
    def test_an_input_that_covers_everything_lends_its_targets(self, tmp_path: Path) -> None:
        write_lora(tmp_path / "align", {Q0: (6, 5, 2)}, layers_to_transform=[0], layers_pattern="layers")
        write_lora(tmp_path / "task", MODULES)
        merge([tmp_path / "align", tmp_path / "task"], weights=[0.1, 0.9], out=tmp_path / "out")
        config = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert config["target_modules"] == ["q_proj", "v_proj"]
        assert config["layers_to_transform"] is None

    def test_targets_that_no_input_covers_are_listed_by_path(self, tmp_path: Path) -> None:
        write_lora(tmp_path / "align", {Q0: (6, 5, 2)}, layers_to_transform=[0])
        write_lora(tmp_path / "task", {V0: (4, 5, 2), Q1: (6, 5, 2)})
        merge([tmp_path / "align", tmp_path / "task"], weights=[0.1, 0.9], out=tmp_path / "out")
        config = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert config["target_modules"] == sorted([Q0, Q1, V0])
        assert config["layers_to_transform"] is None

    def test_the_first_task_type_is_kept(self, tmp_path: Path) -> None:
        paths = pair(tmp_path, task_type=None)
        merge(paths[::-1], weights=[1.0, 1.0], out=tmp_path / "out")
        assert open_adapter(tmp_path / "out").meta.task_type == "CAUSAL_LM"


class TestWeights:
    def test_one_weight_for_two_adapters_means_the_rest_for_the_second(self) -> None:
        assert resolve_weights(["a", "b"], [0.9]) == (0.9, 0.1)
        assert resolve_weights(["a", "b"], [1.5]) == (1.5, -0.5)

    def test_one_weight_for_one_adapter_is_its_own(self) -> None:
        assert resolve_weights(["a"], [0.9]) == (0.9,)

    def test_weights_are_not_normalised(self) -> None:
        assert resolve_weights(["a", "b", "c"], [2.0, -1.0, 0.0]) == (2.0, -1.0, 0.0)

    @pytest.mark.parametrize("weights", [[1, 2], [np.float32(1), np.float64(2)], (1.0, 2.0)])
    def test_any_kind_of_number_becomes_a_float(self, weights: Any) -> None:
        resolved = resolve_weights(["a", "b"], weights)
        assert resolved == (1.0, 2.0)
        assert [type(weight) for weight in resolved] == [float, float]

    @pytest.mark.parametrize(
        ("names", "weights", "words"),
        [
            (["a", "b"], [1.0, 1.0, 1.0], "got 3 for 2 adapters (a, b). With two adapters a single weight"),
            (["a", "b"], [], "got 0 for 2 adapters (a, b)."),
            (["a", "b", "c"], [0.5], "got 1 for 3 adapters (a, b, c)."),
            (["a"], [0.5, 0.5], "got 2 for 1 adapters (a)."),
        ],
    )
    def test_a_count_that_does_not_match_is_refused(self, names: list[str], weights: list[float], words: str) -> None:
        with pytest.raises(PlanError) as caught:
            resolve_weights(names, weights)
        assert words in str(caught.value)

    @pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("count", [1, 2])
    def test_a_weight_that_is_not_finite_is_refused(self, weight: float, count: int) -> None:
        with refuses(r"merge.weights-finite: -?(nan|inf) for adapter 'a'"):
            resolve_weights(["a", "b"], [weight, 1.0][:count])


def test_a_plan_is_frozen_and_knows_its_modules(tmp_path: Path) -> None:
    sources = tuple(open_adapter(path) for path in pair(tmp_path))
    plan = MergePlan(sources=sources, weights=(0.9, 0.1), method=Exact())
    assert plan.modules == sorted(MODULES)
    with pytest.raises(AttributeError):
        plan.rank = 3  # type: ignore[misc]


def test_a_merge_needs_neither_transformers_nor_peft(tmp_path: Path) -> None:
    script = """
import sys
from adaptermix.merging import merge
merge(sys.argv[2:], weights=[0.9], rank=2, max_residual=1.0, out=sys.argv[1])
print(sorted({"transformers", "peft", "datasets", "accelerate"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path / "out"), *map(str, pair(tmp_path))],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
    assert (tmp_path / "out" / WEIGHTS).is_file()
