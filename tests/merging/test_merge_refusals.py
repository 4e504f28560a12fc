"""Merges that are refused, and outputs that stay as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import adaptermix.merging.sinks
from adaptermix.adapters import open_adapter
from adaptermix.errors import AdapterMixError, IncompatibleAdapters
from adaptermix.merging import merge

from ..factories import CONFIG, WEIGHTS, contents, key, write_lora
from ..refusals import refuses
from .test_merge import MODULES, Q0, Q1, V0, pair


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
        ("options", "words"),
        [
            ({"weights": [1.0, 1.0, 1.0]}, "merge.weights-count: got 3 for 2 adapters"),
            ({"weights": [math.nan]}, "merge.weights-finite"),
            ({"method": "exat"}, "method.unknown: 'exact'"),
            ({"options": {"density": 0.2}}, "method.unknown-option"),
            ({"rank": 0}, "rank.too-small: got 0"),
            ({"rank": -1}, "rank.too-small: got -1"),
            ({"dtype": "int8"}, "option.dtype: 'int8'"),
        ],
    )
    def test_a_request_that_makes_no_sense(self, tmp_path: Path, options: dict[str, Any], words: str) -> None:
        paths = pair(tmp_path)
        before = contents(tmp_path)
        with refuses(words):
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


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    paths = pair(tmp_path)
    before = (paths[0] / WEIGHTS).read_bytes()
    with refuses("output.is-input"):
        merge(paths, weights=[0.9], out=paths[0], overwrite=True)
    assert (paths[0] / WEIGHTS).read_bytes() == before
