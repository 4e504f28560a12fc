"""Stopping, killing, resuming, and what the loop does to numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adaptermix import TaskSettings, train_task
from adaptermix.io.files import partial_path
from adaptermix.models.base import load_base
from adaptermix.training.checkpoint import Workplace
from adaptermix.training.lora import inject
from adaptermix.training.trainer import Trainer

from ..refusals import refuses
from .data import write_slots
from .test_task import settings_for


def command(base: Path, folder: Path, out: Path, *more: str) -> list[str]:
    """The real command line, slowed to a few steps per second by its rank and its checkpoints."""
    return [
        sys.executable, "-c", "from adaptermix.cli import main; main()", "train-task", "--base", str(base),
        "--task", "slots", "--train", str(folder / "train.en.jsonl"), "--out", str(out), "--steps", "60",
        "--batch-size", "4", "--dropout", "0.2", "--checkpoint-every", "2", "--dtype", "float32", "--device", "cpu",
        "--learning-rate", "0.01", *more,
    ]  # fmt: skip


def checkpoint_of(out: Path) -> Path:
    return partial_path(out) / "checkpoint.safetensors"


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_interrupting_keeps_a_checkpoint_and_exits_with_130(causal: Path, tmp_path: Path) -> None:
    write_slots(tmp_path)
    out = tmp_path / "task"
    process = subprocess.Popen(
        command(causal, tmp_path, out, "--steps", "5000"), env=environment(), stderr=subprocess.PIPE
    )
    wait_for(checkpoint_of(out), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert b"--resume" in errors
    assert checkpoint_of(out).exists()
    assert not out.exists()


def stopped_run(causal: Path, folder: Path) -> TaskSettings:
    """Leave a checkpoint as a stopped run would."""
    settings = settings_for(causal, folder, steps=6, checkpoint_every=2)
    base = load_base(settings.base, dtype="float32", device="cpu")
    from adaptermix.training.runner import plain

    place = Workplace(Path(settings.out), plain(settings) | {"base_fingerprint": base.fingerprint})
    place.open(resume=False, overwrite=False)
    inject(base.model, settings, seed=0)
    trainer = Trainer(base.model, settings, steps=2, workplace=place)
    parameter = next(p for p in base.model.parameters() if p.requires_grad)
    trainer.run(lambda _number: ((parameter**2).sum(), 1), label="x")
    return settings


def test_an_interrupted_run_is_neither_lost_nor_mixed_up(causal: Path, tmp_path: Path) -> None:
    settings = stopped_run(causal, tmp_path)
    with refuses("run.interrupted"):
        train_task(settings)
    with refuses(r"run.settings: learning_rate was 0\.02, now 0\.5"):
        train_task(settings.model_copy(update={"resume": True, "learning_rate": 0.5}))
    checkpoint_of(Path(settings.out)).write_bytes(b"\x08\0\0\0\0\0\0\0 broken ")
    with refuses("run.not-checkpoint"):
        train_task(settings.model_copy(update={"resume": True}))
    report = train_task(settings.model_copy(update={"overwrite": True}))
    assert [entry["step"] for entry in report.history] == [1, 2, 3, 4, 5, 6]


def test_a_run_does_not_go_on_in_another_dtype_because_of_the_hardware(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dtype auto` is bfloat16 on most GPUs and float32 on most CPUs."""
    import adaptermix.training.runner as module

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    settings = settings_for(causal, tmp_path, dtype="auto", steps=2)
    again = settings.model_copy(update={"resume": True})
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_documents", die)
        patch.setattr("adaptermix.models.base.pick_dtype", lambda *_: torch.bfloat16)
        with pytest.raises(KeyboardInterrupt):
            train_task(settings)
    monkeypatch.setattr(
        "adaptermix.models.base.pick_dtype", lambda name, _: getattr(torch, name.replace("auto", "float32"))
    )
    with refuses("run.settings: dtype was 'bfloat16', now 'float32'"):
        train_task(again)
    assert train_task(again.model_copy(update={"dtype": "bfloat16"})).steps == 2


def test_a_finished_run_has_nothing_to_resume(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, steps=2)
    train_task(settings)
    with refuses("run.complete"):
        train_task(settings.model_copy(update={"resume": True}))
    with refuses("output.exists"):
        train_task(settings)


def test_equal_seeds_give_equal_bytes_and_others_do_not(causal: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_task(settings_for(causal, tmp_path, out=str(tmp_path / name), seed=seed, dropout=0.3))
        found.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_the_global_generator_is_left_alone(causal: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train_task(settings_for(causal, tmp_path, dropout=0.3))
    assert torch.equal(before, torch.get_rng_state())


def test_two_accumulated_batches_equal_one_of_both(causal: Path, tmp_path: Path) -> None:
    """All answers have equally many tokens, so the mean of means is the mean."""
    halves = settings_for(
        causal, tmp_path, batch_size=3, accumulate=2, steps=1, warmup=0.0, out=str(tmp_path / "halves")
    )
    train_task(halves)
    train_task(halves.model_copy(update={"batch_size": 6, "accumulate": 1, "out": str(tmp_path / "whole")}))
    losses = []
    for name in ("halves", "whole"):
        import json

        losses.append(json.loads((tmp_path / name / "history.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_masters_stay_in_float32_under_a_bfloat16_model(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, dtype="bfloat16")
    base = load_base(settings.base, dtype="bfloat16", device="cpu")
    inject(base.model, settings, seed=0)
    base.model.to(torch.bfloat16)
    place = Workplace(tmp_path / "x", {})
    place.open(resume=False, overwrite=False)
    trainer = Trainer(base.model, settings, steps=3, workplace=place)
    parameter = next(p for p in base.model.parameters() if p.requires_grad)
    trainer.run(lambda _number: ((parameter.float() ** 2).sum(), 1), label="x")
    assert {master.dtype for master in trainer.masters.values()} == {torch.float32}
    assert parameter.dtype == torch.bfloat16


def test_a_loss_that_is_no_number_stops_the_run_and_writes_nothing(causal: Path, tmp_path: Path) -> None:
    with refuses("train.not-finite: loss"):
        train_task(settings_for(causal, tmp_path, learning_rate=1e30, warmup=0.0, max_grad_norm=1e30))
    assert not (tmp_path / "task").exists()


def test_the_schedule_is_inverse_square_root_after_warm_up(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, schedule="inverse_sqrt", warmup=0.1, steps=40)
    base = load_base(settings.base, dtype="float32", device="cpu")
    inject(base.model, settings, seed=0)
    place = Workplace(tmp_path / "x", {})
    place.open(resume=False, overwrite=False)
    trainer = Trainer(base.model, settings, steps=40, workplace=place)
    rates = []
    parameter = next(p for p in base.model.parameters() if p.requires_grad)

    def loss(_number: int) -> tuple[torch.Tensor, int]:
        rates.append(trainer._optimizer.param_groups[0]["lr"])
        return (parameter**2).sum(), 1

    trainer.run(loss, label="x")
    peak, warmup = settings.learning_rate, 4
    assert rates[:4] == pytest.approx([peak * step / warmup for step in range(4)])
    assert rates[4:] == pytest.approx([peak * (warmup / step) ** 0.5 for step in range(4, 40)])
