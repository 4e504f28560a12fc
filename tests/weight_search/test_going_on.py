"""A search and a training go on only with the base model that they began with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptermix import search, train_task
from adaptermix.options import SearchSettings, TaskSettings
from tests.factories import peft_lora

from ..refusals import refuses


def weights(base: Path) -> None:
    """Change one value, and neither the size nor the time of the file."""
    path = base / "model.safetensors"
    status = path.stat()
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def config(base: Path) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


def tokenizer(base: Path) -> None:
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))


CHANGES = pytest.mark.parametrize("change", [weights, config, tokenizer])


@pytest.fixture
def own(causal: Path, tmp_path: Path) -> dict[str, Any]:
    """A base model of one's own, and rows."""
    shutil.copytree(causal, tmp_path / "base")
    rows = [{"text": f"wake me {n}", "label": "xy"[n % 2]} for n in range(6)]
    (tmp_path / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"base": str(tmp_path / "base"), "task": "classify", "device": "cpu", "dtype": "float32"}


@CHANGES
def test_a_search_does_not_go_on_with_another_base(
    own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    from adaptermix.weight_search import run

    adapters = [str(peft_lora(Path(own["base"]), tmp_path / f"a{seed}", seed=seed, r=2)) for seed in range(2)]
    dev = [str(tmp_path / "en.jsonl")]
    settings = SearchSettings(
        **own, adapters=adapters, dev=dev, out=str(tmp_path / "out"), grid=[0.5, 0.9], max_new_tokens=2
    )

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "write_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(settings)
    change(tmp_path / "base")
    with refuses("study.other-settings: base_files"):
        search(settings)
    assert search(settings.model_copy(update={"overwrite": True})).out.exists()


@CHANGES
def test_a_training_does_not_go_on_with_another_base(
    own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    from adaptermix.training import runner

    given = own | {"train": [str(tmp_path / "en.jsonl")], "out": str(tmp_path / "out"), "steps": 2, "rank": 2}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "write_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_task(TaskSettings(**given))
    change(tmp_path / "base")
    with refuses("run.settings: base_files was"):
        train_task(TaskSettings(**given, resume=True))


def test_two_trainings_into_one_output_do_not_run_together(own: dict[str, Any], tmp_path: Path) -> None:
    """The second is refused at its start, before the model is loaded, and the first one's checkpoint stays."""
    import threading

    from adaptermix.io.files import output_lock

    given = own | {"train": [str(tmp_path / "en.jsonl")], "out": str(tmp_path / "out"), "steps": 1, "rank": 2}
    held, done = threading.Event(), threading.Event()

    def other() -> None:
        with output_lock(tmp_path / "out"):
            held.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert held.wait(60)
        with refuses("output.busy"):
            train_task(TaskSettings(**given | {"base": "no/such-model"}, overwrite=True))
    finally:
        done.set()
        thread.join()
    assert torch.isfinite(torch.tensor(train_task(TaskSettings(**given)).history[0]["loss"]))


def test_a_search_leaves_the_checkpoint_of_a_training_into_the_same_output_and_the_other_way_round(
    own: dict[str, Any], tmp_path: Path
) -> None:
    partial, out = tmp_path / ".out.partial", str(tmp_path / "out")
    adapters = [str(peft_lora(Path(own["base"]), tmp_path / f"a{seed}", seed=seed, r=2)) for seed in range(2)]
    rows = [str(tmp_path / "en.jsonl")]
    partial.mkdir()
    (partial / "checkpoint.safetensors").write_bytes(b"hours of training")
    search(SearchSettings(**own, adapters=adapters, dev=rows, out=out, grid=[0.5], max_new_tokens=2))
    assert [path.name for path in partial.iterdir()] == ["checkpoint.safetensors"]
    (partial / "checkpoint.safetensors").rename(partial / "trials.log")
    train_task(TaskSettings(**own, train=rows, out=out, steps=1, rank=2, overwrite=True))
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == {"trials.log": b"hours of training"}
