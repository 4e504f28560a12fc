"""What a merge reports and writes next to the adapter: report, manifest and card."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from adaptermix.adapters import open_adapter
from adaptermix.merging import MergeReport, ModuleReport, merge

from ..factories import CONFIG, WEIGHTS, contents, write_lora
from .test_merge import MODULES, Q0, pair
from .test_merge_refusals import fingerprint


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
