"""Each command that writes an adapter: all loaders compute one delta of it and of its exports, or `export` refuses it.

The commands are those of the table; a new one fails here until it has a writer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adaptermix import (
    SearchSettings,
    export,
    extract,
    merge,
    search,
    train_align,
    train_fusion,
    train_joint,
    train_stack,
    train_task,
)
from adaptermix.commands.table import COMMANDS
from adaptermix.io.files import MANIFEST

from .checkpoints.models import linear_only, tune
from .factories import CONFIG
from .fusion.test_commands import settings as fusion_settings
from .loaders import check_exports, check_one_meaning, deltas_by, distance
from .refusals import refuses
from .tiny import tiny_encoder
from .training.data import write_slots
from .training.stacks import stack_settings, stage_2
from .training.test_align import settings_for as align_settings
from .training.test_closed_form import settings_for as least_squares_settings
from .training.test_heads import settings_for as head_settings
from .training.test_joint import settings_for as joint_settings
from .training.test_task import settings_for as task_settings

ENGINES = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx")


@dataclass
class Inputs:
    """What writers need: a base model, and two adapters of different ranks that were trained on it."""

    base: Path
    task: Path
    align: Path
    folder: Path

    @property
    def both(self) -> list[Path]:
        return [self.task, self.align]


def write_task(inputs: Inputs, **more: Any) -> Path:
    train_task(task_settings(inputs.base, inputs.folder, steps=2, **more))
    return inputs.folder / "task"


def write_align(inputs: Inputs, **more: Any) -> Path:
    train_align(align_settings(inputs.base, inputs.folder, steps=2, **more))
    return inputs.folder / "align"


def write_least_squares(inputs: Inputs) -> Path:
    train_align(least_squares_settings(inputs.base, inputs.folder))
    return inputs.folder / "out"


def write_joint(inputs: Inputs) -> Path:
    train_joint(joint_settings(inputs.base, inputs.folder, steps=2))
    return inputs.folder / "out"


def write_merge(inputs: Inputs, **more: Any) -> Path:
    merge(inputs.both, weights=[0.9], out=inputs.folder / "out", **more)
    return inputs.folder / "out"


def write_search(inputs: Inputs, **more: Any) -> Path:
    dev = write_slots(inputs.folder, "dev.en.jsonl")
    search(
        SearchSettings(
            adapters=[str(path) for path in inputs.both],
            base=str(inputs.base),
            task="slots",
            dev=[dev],
            grid=[0.4],
            max_new_tokens=2,
            dtype="float32",
            device="cpu",
            out=str(inputs.folder / "out"),
            **more,
        )
    )
    return inputs.folder / "out"


def write_extract(inputs: Inputs, **more: Any) -> Path:
    tuned = tune(inputs.base, inputs.folder / "tuned", change=linear_only)
    extract(base=str(inputs.base), tuned=str(tuned), out=str(inputs.folder / "out"), **{"rank": 3, **more})
    return inputs.folder / "out"


def write_export(inputs: Inputs) -> Path:
    export(folder=inputs.task, engine="sglang", out=inputs.folder / "out")
    return inputs.folder / "out"


def write_fusion(inputs: Inputs) -> Path:
    train_fusion(fusion_settings(inputs.base, inputs.folder, steps=2))
    return inputs.folder / "fused"


def write_on_stack(inputs: Inputs) -> Path:
    below = tiny_encoder(inputs.folder / "encoder", layers=2, hidden=16)
    train_stack(stack_settings(inputs.base, below, inputs.folder, steps=2))
    train_task(head_settings(inputs.base, inputs.folder, steps=2, head_pooling="mean", out=str(inputs.folder / "top")))
    stack = inputs.folder / "stack"
    train_stack(stage_2(stack, inputs.folder / "top", inputs.folder, steps=2, out=str(inputs.folder / "out")))
    return inputs.folder / "out"


def write_fuse(inputs: Inputs) -> Path:
    rows = write_slots(inputs.folder, "rows.en.jsonl")
    learning: dict[str, Any] = {"method": "fuse", "task": "slots", "train": [rows], "base": str(inputs.base)}
    return write_merge(inputs, **learning, device="cpu")


Writer = Callable[[Inputs], Path]
WRITERS: dict[str, dict[str, Writer]] = {
    "train-task": {
        "plain": write_task,
        "rslora": lambda inputs: write_task(inputs, rslora=True),
        "pissa": lambda inputs: write_task(inputs, init="pissa"),
    },
    "train-align": {
        "contrastive": write_align,
        "least-squares": write_least_squares,
    },
    "train-joint": {"plain": write_joint},
    "train-fusion": {"plain": write_fusion},
    "train-stack": {"stage 2": write_on_stack},
    "merge": {
        "concat": write_merge,
        "lowrank": lambda inputs: write_merge(inputs, form="lowrank", rank=6, max_residual=1.0),
        "auto": lambda inputs: write_merge(inputs, rank="auto", keep=0.9, max_residual=1.0),
        "compact": lambda inputs: write_merge(inputs, compact=True),
        "bfloat16": lambda inputs: write_merge(inputs, dtype="bfloat16"),
        "fuse": write_fuse,
    },
    "extract": {
        "rank": write_extract,
        "compact": lambda inputs: write_extract(inputs, rank="auto", keep=0.7, compact=True),
    },
    "search": {"plain": write_search, "compact": lambda inputs: write_search(inputs, compact=True)},
    "export": {"sglang": write_export},
}
REFUSED = {"train-fusion": "export.fusion", "train-stack": "export.stack"}
"""Codes of the refusals of adapters that no engine serves."""


@pytest.fixture(scope="module")
def inputs_of_all(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    inputs = Inputs(causal, folder / "task", folder / "align", folder)
    write_task(inputs, learning_rate=0.1)
    write_align(inputs, rank=3, learning_rate=0.1)
    return inputs


def test_every_command_that_writes_adapters_is_here() -> None:
    assert set(WRITERS) == {name for name, command in COMMANDS.items() if command.makes}


@pytest.mark.parametrize(("command", "form"), [(command, form) for command, forms in WRITERS.items() for form in forms])
def test_all_loaders_compute_one_delta(inputs_of_all: Inputs, tmp_path: Path, command: str, form: str) -> None:
    inputs = Inputs(inputs_of_all.base, inputs_of_all.task, inputs_of_all.align, tmp_path)
    folder = WRITERS[command][form](inputs)
    if command in REFUSED:
        for engine in ENGINES:
            with refuses(REFUSED[command]):
                export(folder=folder, engine=engine, out=tmp_path / "export")
            assert not (tmp_path / "export").exists()
        return
    expected = deltas_by("peft", folder)
    assert math.hypot(*(float(delta.norm()) for delta in expected.values())) > 0
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if form == "compact":
        assert config["rank_pattern"]
    else:
        assert distance(check_one_meaning(folder), expected) == 0
    check_exports(folder, inputs.base, tmp_path / "exports", expected)
    rounding = 5e-3 if form == "bfloat16" else 1e-5
    assert _check_norms(folder, expected, rounding) == (0 if command.startswith("train-") else len(expected))


def _check_norms(folder: Path, expected: dict[str, Any], rounding: float) -> int:
    """Compare the norms that the manifest of a merge names with those of the deltas, and return their number.

    The manifest has the norm before a truncation, and the share that was lost, which is orthogonal to the rest.
    """
    fidelity = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("fidelity", {})
    entries = {path: entry for path, entry in fidelity.get("modules", {}).items() if "norm" in entry}
    for path, entry in entries.items():
        left = math.sqrt(1 - (entry.get("residual") or 0.0) ** 2)
        assert float(expected[path].norm()) == pytest.approx(left * entry["norm"], rel=rounding, abs=1e-6), path
    return len(entries)
