"""merge: adapter folders in, one adapter folder out."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptermix.merging.sinks
from adaptermix.adapters import open_adapter
from adaptermix.errors import AdapterMixError, IncompatibleAdapters, PlanError
from adaptermix.merging import MergePlan, MergeReport, ModuleReport, merge, resolve_weights
from adaptermix.methods.exact import Exact

from ..factories import CONFIG, WEIGHTS, adapter_deltas, contents, key, write_lora
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
        with pytest.raises(PlanError, match=r"weights must be finite numbers, got -?(nan|inf) for adapter 'a'"):
            resolve_weights(["a", "b"], [weight, 1.0][:count])


class TestCompatibility:
    def test_bases_of_other_names_are_refused_by_name(self, tmp_path: Path) -> None:
        paths = pair(tmp_path, base="org/base-instruct")
        with pytest.raises(IncompatibleAdapters) as caught:
            merge(paths, weights=[0.9], out=tmp_path / "out")
        assert str(caught.value) == (
            "adapters 'task' and 'align' must come from one base model, found 'org/base' and 'org/base-instruct'. "
            "If the two are the same model under two names, pass --allow-base-mismatch."
        )
        assert not (tmp_path / "out").exists()

    def test_bases_of_other_revisions_are_refused(self, tmp_path: Path) -> None:
        with refuses("adapters.bases: 'org/base'.*'org/base@v2'"):
            merge(pair(tmp_path, revision="v2"), weights=[0.9])

    def test_bases_of_other_fingerprints_are_refused_though_the_names_agree(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        for path, mark in zip(paths, ("aa", "bb"), strict=True):
            fingerprint(path, mark)
        with refuses("adapters.bases: task.*align"):
            merge(paths, weights=[0.9])

    def test_bases_of_one_fingerprint_are_one_base_under_two_names(self, tmp_path: Path) -> None:
        paths = pair(tmp_path, base="/models/base")
        for path in paths:
            fingerprint(path, "aa")
        merge(paths, weights=[0.9])

    def test_one_fingerprint_is_not_compared_with_none(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        fingerprint(paths[0], "aa")
        merge(paths, weights=[0.9])

    def test_every_pair_is_compared(self, tmp_path: Path) -> None:
        """Two fingerprints that differ, with an adapter between them that has none."""
        paths = [*pair(tmp_path), tmp_path / "style"]
        write_lora(paths[2], MODULES)
        fingerprint(paths[0], "aa")
        fingerprint(paths[2], "bb")
        with refuses("adapters.bases: task.*style"):
            merge(paths, weights=[1.0, 1.0, 1.0])

    def test_a_mismatch_can_be_allowed(self, tmp_path: Path) -> None:
        paths = pair(tmp_path, base="org/other")
        merge(paths, weights=[0.9], out=tmp_path / "out", allow_base_mismatch=True)
        assert open_adapter(tmp_path / "out").meta.base == "org/base"

    @pytest.mark.parametrize("allow", [False, True])
    def test_shapes_that_differ_are_refused_always(self, tmp_path: Path, allow: bool) -> None:
        paths = pair(tmp_path)
        write_lora(paths[1], {Q1: (6, 7, 2), V0: (4, 5, 2)})
        with pytest.raises(IncompatibleAdapters) as caught:
            merge(paths, weights=[0.9], out=tmp_path / "out", allow_base_mismatch=allow)
        assert str(caught.value) == (
            f"module '{Q1}': update shapes must be equal, found 'task' [6 5] and 'align' [6 7]. "
            "The adapters belong to different base models."
        )
        assert not (tmp_path / "out").exists()

    def test_layouts_that_differ_are_refused(self, tmp_path: Path) -> None:
        with refuses("adapters.fan-in-fan-out: task.*align"):
            merge(pair(tmp_path, fan_in_fan_out=True), weights=[0.9], allow_base_mismatch=True)


def fingerprint(folder: Path, mark: str) -> None:
    (folder / "adaptermix.json").write_text(json.dumps({"base": {"fingerprint": mark}}))


class TestRefusals:
    """Nothing is written, not even a hidden folder."""

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"weights": [1.0, 1.0, 1.0]}, PlanError, "got 3 for 2 adapters"),
            ({"weights": [math.nan]}, PlanError, "finite"),
            ({"method": "exat"}, PlanError, "Did you mean 'exact'"),
            ({"options": {"density": 0.2}}, PlanError, "unknown option"),
            ({"rank": 0}, PlanError, "--rank must be at least 1, got 0"),
            ({"rank": -1}, PlanError, "--rank must be at least 1, got -1"),
            ({"dtype": "int8"}, PlanError, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ],
    )
    def test_a_request_that_makes_no_sense(
        self, tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        paths = pair(tmp_path)
        before = contents(tmp_path)
        with pytest.raises(error, match=words):
            merge(paths, **{"weights": [0.9], "out": tmp_path / "out"} | options)
        assert contents(tmp_path) == before

    def test_no_adapter(self) -> None:
        with refuses("merge.no-adapter"):
            merge([], weights=[])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("weights", [[0.9, 0.1], [1.0, 0.0]])
    def test_an_adapter_that_diverged(self, tmp_path: Path, value: float, weights: list[float]) -> None:
        paths = pair(tmp_path)
        tensors = load_file(paths[1] / WEIGHTS)
        tensors[key(V0, "B")][0, 0] = value
        save_file(tensors, paths[1] / WEIGHTS)
        before = contents(tmp_path)
        with refuses("adapter-file.not-finite"):
            merge(paths, weights=weights, out=tmp_path / "out")
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("rank", [None, 1])
    @pytest.mark.parametrize(("alpha", "dtype"), [(1e300, "float32"), (1e308, "float32"), (1e7, "float16")])
    def test_a_merge_that_overflows(self, tmp_path: Path, alpha: float, dtype: str, rank: int | None) -> None:
        paths = pair(tmp_path, alpha=alpha)
        before = contents(tmp_path)
        with pytest.raises(AdapterMixError, match=r"finite"):
            merge(paths, weights=[1.0, 1e6], out=tmp_path / "out", dtype=dtype, rank=rank, max_residual=1.0)
        assert contents(tmp_path) == before

    def test_an_output_that_exists(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        (tmp_path / "out").mkdir()
        with refuses("output.exists"):
            merge(paths, weights=[0.9], out=tmp_path / "out")
        assert contents(tmp_path / "out") == {}

    def test_an_output_is_checked_before_anything_is_read(self, tmp_path: Path) -> None:
        with refuses("output.exists"):
            merge([tmp_path / "nothing"], weights=[1.0], out=tmp_path)

    def test_a_folder_of_something_else_even_with_overwrite(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        before = contents(tmp_path)
        with refuses("output.not-adapter"):
            merge(paths, weights=[0.9], out=tmp_path / "out", overwrite=True)
        assert contents(tmp_path) == before


class TestOverwriting:
    def test_an_adapter_folder_is_replaced_whole(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        write_lora(tmp_path / "out", {Q0: (2, 2, 1)})
        merge(paths, weights=[0.9], out=tmp_path / "out", overwrite=True)
        assert set(contents(tmp_path / "out")) == {CONFIG, WEIGHTS, "adaptermix.json", "README.md"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["align", "out", "task"]

    def test_a_file_that_is_not_the_adapters_is_kept(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        write_lora(tmp_path / "out", {Q0: (2, 2, 1)})
        (tmp_path / "out" / "notes.txt").write_text("mine")
        before = contents(tmp_path)
        with refuses(r"output.other-files: 'notes\.txt'"):
            merge(paths, weights=[0.9], out=tmp_path / "out", overwrite=True)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
    def test_a_failure_while_writing_keeps_the_old_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def fails(folder: Path, *_: object, **__: object) -> None:
            (folder / WEIGHTS).write_text("half")
            raise error

        paths = pair(tmp_path)
        merge(paths, weights=[0.9], out=tmp_path / "out")
        before = contents(tmp_path)
        monkeypatch.setattr(adaptermix.merging.sinks, "adapter_writer", fails)
        with pytest.raises(type(error)):
            merge(paths, weights=[0.5], out=tmp_path / "out", overwrite=True)
        assert contents(tmp_path) == before
        with pytest.raises(type(error)):
            merge(paths, weights=[0.5], out=tmp_path / "new")
        assert contents(tmp_path) == before


class TestReport:
    def test_sign_conflict_is_that_of_the_weighted_deltas(self, tmp_path: Path) -> None:
        one = write_lora(tmp_path / "task", MODULES, alpha=8, seed=1)
        other = write_lora(tmp_path / "align", MODULES, alpha=4, seed=2)
        shares = {}
        for sign in (1.0, -1.0):
            report = merge([tmp_path / "task", tmp_path / "align"], weights=[0.5, sign])
            for module in MODULES:
                share = float((one[module] * other[module] * sign < 0).double().mean())
                assert report.modules[module].sign_conflict == pytest.approx(share, abs=1e-12)
            shares[sign] = report.sign_conflict
        assert shares[1.0] + shares[-1.0] == pytest.approx(1.0)

    def test_without_an_output_nothing_is_written_and_the_numbers_are_the_same(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        before = contents(tmp_path)
        dry = merge(paths, weights=[0.9], rank=2, max_residual=1.0)
        assert contents(tmp_path) == before
        wet = merge(paths, weights=[0.9], rank=2, max_residual=1.0, out=tmp_path / "out")
        assert (dry.out, wet.out) == (None, tmp_path / "out")
        assert dry.fidelity() == wet.fidelity()

    def test_the_document_is_plain_json(self, tmp_path: Path) -> None:
        report = merge(pair(tmp_path), weights=[0.9], rank=2, max_residual=1.0, out=tmp_path / "out")
        document = json.loads(json.dumps(report.document(), allow_nan=False))
        keys = {"out", "plan", "method", "weights", "norm", "residual", "rounding", "rank", "bytes", "sign_conflict"}
        assert set(document) == keys | {"modules"}
        assert (document["rank"], document["bytes"]) == (2, (tmp_path / "out" / WEIGHTS).stat().st_size)
        assert document["weights"] == [0.9, 0.1]
        assert set(document["modules"]) == set(MODULES)
        assert set(document["modules"][Q0]) == {
            "rank",
            "norm",
            "residual",
            "sign_conflict",
            "weights",
            "excess",
            "rounding",
        }

    def test_totals_are_those_of_the_whole_delta(self) -> None:
        made = {
            "x": ModuleReport(rank=1, norm=3.0, residual=0.5, sign_conflict=0.2, weights=(0.9, 0.1)),
            "y": ModuleReport(rank=1, norm=4.0, residual=0.0, sign_conflict=0.4, weights=(0.9, 0.1)),
            "alone": ModuleReport(rank=1, norm=0.0, residual=0.0, sign_conflict=0.0, weights=(0.9, 0.0)),
        }
        report = MergeReport(out=None, method="exact", weights=(1.0,), modules=made)
        assert report.norm == pytest.approx(5.0)
        assert report.residual == pytest.approx(1.5 / 5.0)
        assert report.sign_conflict == pytest.approx(0.3)


class TestManifest:
    def test_equal_plans_give_equal_bytes(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            merge(paths, weights=[0.9], rank=3, max_residual=1.0, out=tmp_path / name / "merged")
        one, two = (contents(tmp_path / name) for name in ("one", "two"))
        assert one == two
        assert len(one) == 5

    def test_equal_plans_give_equal_bytes_wherever_the_inputs_lie(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            merge(pair(tmp_path / name), weights=[0.9], out=tmp_path / name / "merged")
        one, two = (contents(tmp_path / name / "merged") for name in ("one", "two"))
        for content in (one, two):
            document = json.loads(content.pop("adaptermix.json"))
            for entry in document["inputs"]:
                entry.pop("path")
            content["document"] = json.dumps(document).encode()
        assert one == two

    def test_whole_numbers_and_floats_are_one_plan(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        merge(paths, weights=[1, 2], out=tmp_path / "one" / "merged")
        merge(paths, weights=[np.float32(1), 2.0], out=tmp_path / "two" / "merged")
        assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def test_the_order_of_hashing_does_not_matter(self, tmp_path: Path) -> None:
        paths = pair(tmp_path, rank_pattern={}, alpha_pattern={"v_proj": 2})
        script = "import sys; from adaptermix.merging import merge; merge(sys.argv[2:], weights=[0.9], out=sys.argv[1])"
        for seed in ("0", "1"):
            subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / seed / "merged"), *map(str, paths)],
                check=True,
                env={"PYTHONHASHSEED": seed, "PATH": ""},
            )
        assert contents(tmp_path / "0") == contents(tmp_path / "1")

    def test_it_says_what_was_done_to_what(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        (paths[1] / "adaptermix.json").write_text(
            json.dumps(
                {
                    "kind": "train-align",
                    "base": {"fingerprint": "f00d"},
                    "languages": {"aligned": ["sw", "de"]},
                }
            )
        )
        (paths[0] / "adaptermix.json").write_text(
            json.dumps({"kind": "train-task", "languages": {"supervised": ["en"]}, "task": "slots"})
        )
        report = merge(paths, weights=[0.9], rank=3, max_residual=1.0, dtype="bfloat16", out=tmp_path / "out")
        document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
        assert document["kind"] == "merge"
        assert document["plan"] == {
            "allow_base_mismatch": False,
            "allow_pickle": False,
            "method": "exact",
            "weights": [0.9, 0.1],
            "rank": 3,
            "dtype": "bfloat16",
            "fill": "weight",
            "saved": "refuse",
            "max_residual": 1.0,
        }
        assert document["base"]["id"] == "org/base"
        assert document["languages"] == {"supervised": ["en"], "aligned": ["de", "sw"]}
        assert document["task"] == "slots"
        assert document["versions"]["torch"] == torch.__version__
        assert document["fidelity"] == json.loads(json.dumps(report.fidelity()))
        for entry, path, weight, kind in zip(
            document["inputs"], paths, [0.9, 0.1], ["train-task", "train-align"], strict=True
        ):
            assert entry == {
                "name": path.name,
                "path": str(path),
                "kind": kind,
                "weight": weight,
                "weights_sha256": hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest(),
                "config_sha256": hashlib.sha256((path / CONFIG).read_bytes()).hexdigest(),
            }

    def test_the_fingerprint_of_the_base_is_inherited(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        fingerprint(paths[0], "aa")
        merge(paths, weights=[0.9], out=tmp_path / "out")
        assert open_adapter(tmp_path / "out").meta.base_fingerprint == "aa"

    def test_a_fingerprint_of_another_base_is_not_inherited(self, tmp_path: Path) -> None:
        paths = pair(tmp_path, base="org/other")
        fingerprint(paths[1], "bb")
        merge(paths, weights=[0.9], out=tmp_path / "out", allow_base_mismatch=True)
        assert open_adapter(tmp_path / "out").meta.base_fingerprint is None

    def test_tasks_that_differ_are_left_out(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        for path, task in zip(paths, ("slots", "qa"), strict=True):
            (path / "adaptermix.json").write_text(json.dumps({"task": task}))
        merge(paths, weights=[0.9], out=tmp_path / "out")
        assert "task" not in json.loads((tmp_path / "out" / "adaptermix.json").read_text())

    @pytest.mark.parametrize(
        "manifest", ['{"languages": null}', '{"languages": ["de"]}', '{"languages": {"aligned": 3}}', "[]"]
    )
    def test_a_manifest_of_another_form_is_no_crash(self, tmp_path: Path, manifest: str) -> None:
        paths = pair(tmp_path)
        (paths[1] / "adaptermix.json").write_text(manifest)
        merge(paths, weights=[0.9], out=tmp_path / "out")
        assert "languages" not in json.loads((tmp_path / "out" / "adaptermix.json").read_text())


class TestCard:
    def header(self, folder: Path) -> dict[str, Any]:
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert text.startswith("---\n")
        header = yaml.safe_load(text.split("---\n")[1])
        assert isinstance(header, dict)
        return header

    def test_a_hub_base_is_named_in_the_header(self, tmp_path: Path) -> None:
        merge(pair(tmp_path), weights=[0.9], out=tmp_path / "out")
        header = self.header(tmp_path / "out")
        assert header["base_model"] == "org/base"
        assert header["base_model_relation"] == "adapter"
        assert header["library_name"] == "peft"
        assert header["tags"] == ["lora", "adaptermix", "merge"]

    @pytest.mark.parametrize("local", ["{tmp}/base", "/models/base", "./base", "../base", "~/base", "a/b/c"])
    def test_a_local_base_is_not_named_in_the_header(self, tmp_path: Path, local: str) -> None:
        base = local.format(tmp=tmp_path)
        write_lora(tmp_path / "task", MODULES, base=base)
        merge([tmp_path / "task"], weights=[1.0], out=tmp_path / "out")
        assert "base_model" not in self.header(tmp_path / "out")
        assert "base_model_relation" not in self.header(tmp_path / "out")

    def test_a_folder_that_looks_like_a_hub_id_is_local(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models" / "base").mkdir(parents=True)
        write_lora(tmp_path / "task", MODULES, base="models/base")
        merge([tmp_path / "task"], weights=[1.0], out=tmp_path / "out")
        assert "base_model" not in self.header(tmp_path / "out")

    def test_languages_stand_in_the_header_and_the_text(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        languages = {"supervised": ["en"], "aligned": ["no", "sw"]}
        (paths[0] / "adaptermix.json").write_text(json.dumps({"languages": languages}))
        merge(paths, weights=[0.9], out=tmp_path / "out")
        assert self.header(tmp_path / "out")["language"] == ["en", "no", "sw"]
        text = (tmp_path / "out" / "README.md").read_text()
        assert "trained on the task in en" in text
        assert "aligned in no, sw" in text  # nothing says that English was the other side

    def test_an_adapter_of_weight_zero_gives_the_card_no_language(self, tmp_path: Path) -> None:
        paths = pair(tmp_path)
        for path, role, name in zip(paths, ("supervised", "aligned"), ("en", "sw"), strict=True):
            (path / "adaptermix.json").write_text(json.dumps({"languages": {role: [name]}}))
        for weights, languages in (([1.0, 0.0], ["en"]), ([0.0, 1.0], ["sw"]), ([1.0, 1e-3], ["en", "sw"])):
            merge(paths, weights=weights, out=tmp_path / "out", overwrite=True)
            assert self.header(tmp_path / "out")["language"] == languages

    def test_the_text_names_inputs_weights_and_losses(self, tmp_path: Path) -> None:
        report = merge(pair(tmp_path), weights=[0.9], rank=1, max_residual=1.0, out=tmp_path / "my-merge")
        text = (tmp_path / "my-merge" / "README.md").read_text()
        assert "# my-merge\n" in text
        for name, weight in (("task", "0.9"), ("align", "0.1")):
            digest = hashlib.sha256((tmp_path / name / WEIGHTS).read_bytes()).hexdigest()
            assert f"| {name} | {weight} | `{digest[:12]}` |" in text
        assert f"lost to truncation {report.residual:.2%}" in text


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


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    paths = pair(tmp_path)
    before = (paths[0] / WEIGHTS).read_bytes()
    with refuses("output.is-input"):
        merge(paths, weights=[0.9], out=paths[0], overwrite=True)
    assert (paths[0] / WEIGHTS).read_bytes() == before
