"""`--keep-looks`: the factors of every measurement of the dev loss stay, as outputs of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from adaptermix import evaluate, train_joint, train_stack, train_task
from adaptermix.options import PushSettings
from adaptermix.publish.hub import push

from ..refusals import refuses
from .data import write_slots
from .stacks import TEXTS, stack_settings, write_texts
from .test_heads import evaluated, settings_for, write_labels
from .test_joint import settings_for as joint_settings

WEIGHTS = "adapter_model.safetensors"


def run(command: str, base: Path, below: Path, folder: Path, **more: Any) -> Path:
    """Train with a command, and return the folder of the LoRA."""
    out = folder / str(more["steps"])
    more |= {"out": str(out)}
    if command == "train-task":
        train_task(settings_for(base, folder, dev=[write_labels(folder, "dev.en.tsv")], **more))
    elif command == "train-joint":
        train_joint(joint_settings(base, folder, dev=[write_slots(folder, "dev.en.jsonl")], **more))
    else:
        train_stack(stack_settings(base, below, folder, dev_texts=[write_texts(folder, "dev.txt", TEXTS[:3])], **more))
    return out


@pytest.mark.parametrize("command", ["train-task", "train-joint", "train-stack"])
def test_a_look_is_the_output_of_a_run_that_ends_there(command: str, causal: Path, below: Path, tmp_path: Path) -> None:
    short = run(command, causal, below, tmp_path, steps=2)
    out = run(command, causal, below, tmp_path, steps=5, evaluate_every=2, keep_looks=True)
    looks = sorted(path.name for path in (out / "looks").iterdir())
    assert looks == ["2", "4"]
    inner = "adapter" if command == "train-stack" else ""
    for name in (Path(inner) / WEIGHTS, *(["projection.safetensors"] if inner else [])):
        expected, found = load_file(short / name), load_file(out / "looks" / "2" / name)
        assert expected.keys() == found.keys()
        assert all(expected[key].equal(found[key]) for key in expected)
        assert not all(expected[key].equal(value) for key, value in load_file(out / name).items())
    manifest = json.loads((out / "looks" / "4" / "adaptermix.json").read_text())
    assert manifest["selection"] == {"kept_step": 4, "steps": 5}
    history = (out / "looks" / "2" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [1, 2, 2]
    assert not list(out.parent.glob(f".{out.name}.partial"))


def test_a_resumed_run_has_the_looks_before_the_interruption(causal: Path, tmp_path: Path) -> None:
    class Stop:
        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    more: dict[str, Any] = {"evaluate_every": 2, "keep_looks": True, "checkpoint_every": 1, "steps": 5}
    settings = settings_for(causal, tmp_path, dev=[write_labels(tmp_path, "dev.en.tsv")], **more)
    with pytest.raises(KeyboardInterrupt):
        train_task(settings, callbacks=[Stop()])
    train_task(settings.model_copy(update={"resume": True}))
    assert {path.name for path in (tmp_path / "out" / "looks").iterdir()} == {"2", "4"}


def test_looks_are_chosen_by_evaluate_and_not_published(causal: Path, tmp_path: Path) -> None:
    dev = write_labels(tmp_path, "dev.de.tsv")
    more: dict[str, Any] = {"evaluate_every": 2, "keep_looks": True, "steps": 3}
    train_task(settings_for(causal, tmp_path, dev=[dev], **more))
    out = tmp_path / "out"
    assert evaluate(evaluated(causal, out / "looks" / "2", dev)).scores["de"].n == 12
    report = push(PushSettings(folder=str(out), repo="me/x", base_id="me/base", dry_run=True))
    assert not [name for name, _ in report.files if "looks" in name]


def test_looks_need_dev_files(causal: Path, tmp_path: Path) -> None:
    with refuses("train.no-dev"):
        settings_for(causal, tmp_path, keep_looks=True)
