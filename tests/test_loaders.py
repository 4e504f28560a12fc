"""Every adapter that a command writes means the same to every program that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix import (
    MergeSettings,
    SearchSettings,
    export,
    merge_learned,
    search,
    train_align,
    train_joint,
    train_task,
)
from adaptermix.merging.extract_adapter import extract

from .checkpoints.models import linear_only, tune
from .factories import CONFIG, WEIGHTS, load_base, peft_kind
from .fusion.test_commands import write_rows
from .loaders import check_exports, check_one_meaning, deltas_by, distance
from .refusals import refuses
from .training.data import write_slots
from .training.test_align import settings_for as align_settings
from .training.test_joint import settings_for as joint_settings
from .training.test_starting import STILL
from .training.test_starting import settings_for as go_on
from .training.test_task import settings_for as task_settings


@pytest.mark.parametrize("settings", [{"rank": 3}, {"rank": "auto", "keep": 0.7}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_extract(base: Path, tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    tuned = tune(base, tmp_path / "tuned", change=linear_only)
    report = extract(base, tuned, out=tmp_path / "out", dtype=dtype, **settings)
    got = check_one_meaning(tmp_path / "out")
    was, now = (load_base(folder).state_dict() for folder in (base, tuned))
    true = {path: (now[f"{path}.weight"] - was[f"{path}.weight"]).double() for path in got}
    assert distance(got, true) == pytest.approx(report.residual, rel=1e-3)
    assert report.bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    extract(base, tuned, out=tmp_path / "compact", dtype=dtype, compact=True, **settings)
    config = json.loads((tmp_path / "compact" / CONFIG).read_text())
    ranks = {module.rank for module in report.modules.values()}
    assert {config["r"], *config["rank_pattern"].values()} == ranks
    assert config["r"] == max(ranks)
    assert distance(deltas_by("peft", tmp_path / "compact"), got) == 0
    check_exports(tmp_path / "compact", base, tmp_path / "exports", got)


def test_trainings_and_a_search(causal: Path, tmp_path: Path) -> None:
    train_task(task_settings(causal, tmp_path, steps=2, init="pissa", rslora=True))
    train_align(align_settings(causal, tmp_path, steps=2))
    for name in ("task", "align"):
        check_one_meaning(tmp_path / name)
    dev = write_slots(tmp_path, "dev.en.jsonl")
    common: dict[str, Any] = {"base": str(causal), "task": "slots", "max_new_tokens": 2, "dtype": "float32"}
    asked: dict[str, Any] = {"adapters": [str(tmp_path / n) for n in ("task", "align")], "dev": [dev]} | common
    for name, more in (("filled", {}), ("compact", {"compact": True})):
        result = search(SearchSettings(**asked, grid=[0.4], device="cpu", out=str(tmp_path / name), **more))
        assert result.document()["rank"] == result.rank == 20  # 8 as PiSSA less its start, and 4
        assert result.document()["bytes"] == (tmp_path / name / WEIGHTS).stat().st_size
    found = check_one_meaning(tmp_path / "filled")
    assert distance(deltas_by("peft", tmp_path / "compact"), found) == 0
    assert json.loads((tmp_path / "compact" / CONFIG).read_text())["rank_pattern"]
    check_exports(tmp_path / "compact", causal, tmp_path / "exports", found)


def test_training_on_two_objectives_and_from_an_adapter_of_unequal_ranks(causal: Path, tmp_path: Path) -> None:
    train_joint(joint_settings(causal, tmp_path, steps=2))
    check_exports(tmp_path / "out", causal, tmp_path / "exports", check_one_meaning(tmp_path / "out"))
    unequal: dict[str, Any] = {"r": 4, "rank_pattern": {"v_proj": 2}, "target_modules": ["q_proj", "v_proj"]}
    start = peft_kind(load_base(causal), tmp_path / "start", **unequal)
    before = deltas_by("peft", start)
    for name in ("once", "twice"):  # the second time from one that is filled up with zeros
        train_task(go_on(causal, tmp_path, start_from=str(start), out=str(tmp_path / name), learning_rate=STILL))
        assert distance(check_one_meaning(tmp_path / name), before) < 1e-5
        start = tmp_path / name
    check_exports(start, causal, tmp_path / "more", deltas_by("peft", start))


def test_learned_weights(encoder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "en.csv", says=True)
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32", "dropout": 0.0}
    task: dict[str, Any] = {"task": "classify", "train": [rows]}
    train_task(task_settings(encoder, tmp_path, **common, **task, rank=4, steps=2))
    train_align(align_settings(encoder, tmp_path, **common, rank=2, steps=2))
    settings = MergeSettings(
        adapters=[str(tmp_path / name) for name in ("task", "align")],
        weights=[0.5],
        method="fuse",
        out=str(tmp_path / "out"),
        base=str(encoder),
        device="cpu",
        **task,
    )
    assert merge_learned(settings).rank == 6
    check_one_meaning(tmp_path / "out")
    with refuses("export.whole-tensors: heads.*'classifier"):
        export(folder=tmp_path / "task", engine="vllm", out=tmp_path / "export")
    with refuses("export.encoder"):
        export(folder=tmp_path / "align", engine="vllm", out=tmp_path / "export")
