"""Callbacks have the protocol of transformers, and trackers of accelerate receive what training logs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from adaptermix import TaskSettings, train_task
from adaptermix.progress import SILENT
from adaptermix.training.callbacks import tracking
from adaptermix.training.parallel import ALONE

from ..cli.test_commands import run
from ..refusals import refuses
from .data import Notes, write_slots
from .test_joint import values


class Recorder(TrainerCallback):
    """Records events; at some steps it sets a field of the control."""

    def __init__(self, **orders: tuple[str, int]) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, Any]] = []
        self.orders = orders

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def method(args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> TrainerControl:
            assert isinstance(args, TaskSettings)
            assert {"model", "optimizer", "lr_scheduler"} <= more.keys()
            self.events.append((name, state.global_step))
            self.logs += [more["logs"]] if "logs" in more else []
            for field, (event, step) in self.orders.items():
                if event == name and step == state.global_step:
                    setattr(control, field, True)
            return control

        return method


def settings_for(base: Path, folder: Path, **more: Any) -> TaskSettings:
    data = {"task": "slots", "train": [write_slots(folder)], "dev": [write_slots(folder, "dev.en.jsonl")]}
    return TaskSettings(**values(base, folder, **data, **({"steps": 3, "evaluate_every": 2} | more)))


def test_callbacks_see_each_event_in_its_order(causal: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    report = train_task(settings_for(causal, tmp_path), callbacks=[recorder])
    step = ("on_step_begin", "on_step_end", "on_log")
    events = ["on_train_begin", *step, *step, "on_evaluate", *step, "on_save", "on_train_end"]
    assert [name for name, _ in recorder.events] == events
    assert [at for name, at in recorder.events if name == "on_log"] == [1, 2, 3]
    assert [logs["loss"] for logs in recorder.logs] == [entry["loss"] for entry in report.history if "loss" in entry]
    assert all(logs["learning_rate"] >= 0 and logs["grad_norm"] > 0 for logs in recorder.logs)


def test_callbacks_can_stop_evaluate_and_save(causal: Path, tmp_path: Path) -> None:
    orders = {
        "should_evaluate": ("on_step_end", 1),
        "should_save": ("on_log", 1),
        "should_training_stop": ("on_step_end", 2),
    }
    recorder = Recorder(**orders)
    report = train_task(settings_for(causal, tmp_path, steps=9, evaluate_every=9), callbacks=[recorder])
    assert [event for event in recorder.events if event[0] in ("on_evaluate", "on_save", "on_train_end")] == [
        ("on_evaluate", 1),
        ("on_save", 1),
        ("on_save", 2),
        ("on_train_end", 2),
    ]
    assert report.document()["steps"] == 2


def test_a_callback_needs_only_the_methods_it_has_and_changes_nothing(causal: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    class Short:
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(state.global_step)

    settings = settings_for(causal, tmp_path)
    train_task(settings, callbacks=[Short()])
    train_task(settings.model_copy(update={"out": str(tmp_path / "plain")}))
    assert seen == [1, 2, 3]
    weights = [(Path(out) / "adapter_model.safetensors").read_bytes() for out in (settings.out, tmp_path / "plain")]
    assert weights[0] == weights[1]


TRACKIO = """
import json
from pathlib import Path
class Config:
    def update(self, values, allow_val_change):
        _write({"config": values})
config = Config()
def _write(entry):
    with open(FILE, "a") as file:
        file.write(json.dumps(entry) + chr(10))
class Run:
    def log(self, values, step):
        _write({"step": step, **values})
    def finish(self):
        _write({"finished": True})
def init(project, name, **more):
    _write({"project": project, "name": name, **more})
    if FAILS:
        raise RuntimeError("no route to the server")
    return Run()
"""


def fake_package(folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
    """Let a module take the place of trackio: accelerate's own tracker calls it."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    (folder / "trackio.py").write_text(f"FILE, FAILS = {str(log)!r}, {fails}\n{TRACKIO}")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TRACKIO])
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)


def test_what_a_tracker_receives(causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, tmp_path / "log", monkeypatch)
    report = train_task(settings_for(causal, tmp_path, log_with="trackio"))
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert entries[0] == {"project": "adaptermix", "name": report.out.name}
    assert entries[1]["config"]["rank"] == 4
    assert entries[1]["config"]["targets"] == "all-linear"
    losses = [entry["loss"] for entry in report.history if "loss" in entry]
    assert [(entry["step"], entry["train/loss"]) for entry in entries if "train/loss" in entry] == [
        (step, loss) for step, loss in enumerate(losses, 1)
    ]
    dev = next(entry["dev_loss"] for entry in report.history if "dev_loss" in entry)
    assert {"step": 2, "dev/loss": dev} in entries
    assert entries[-1] == {"finished": True}


def test_a_tracker_is_closed_when_training_fails(causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, tmp_path / "log", monkeypatch)

    class Failing:
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_task(settings_for(causal, tmp_path, log_with="trackio"), callbacks=[Failing()])
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1]) == {"finished": True}


def test_a_tracker_that_fails_ends_the_log_and_not_the_training(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, tmp_path / "log", monkeypatch)
    broken = TRACKIO.replace('_write({"step": step', 'step > 1 and 1 / 0; _write({"step": step').replace(
        '_write({"finished": True})', 'raise RuntimeError("gone")'
    )
    (tmp_path / "trackio.py").write_text(f"FILE, FAILS = {str(tmp_path / 'log')!r}, False\n{broken}")
    notes = Notes()
    report = train_task(settings_for(causal, tmp_path, log_with="trackio"), watch=notes)
    assert report.document()["steps"] == 3
    assert [note for note in notes.said if "tracker failed" in note] == [
        f"warning: logging stopped, since the tracker failed: {error}" for error in ("division by zero", "gone")
    ]


def test_a_tracker_that_does_not_start_is_reported(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, tmp_path / "log", monkeypatch, fails=True)
    with refuses("log.failed: trackio.*no route to the server"):
        train_task(settings_for(causal, tmp_path, log_with="trackio"))


def test_a_tracker_whose_package_is_missing_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    arguments = ["--base", "no-such-model", "--task", "slots", "--train", write_slots(tmp_path)]
    code, _, said = run(capsys, "train-task", *arguments, "--out", tmp_path / "out", "--log-with", "wandb")
    assert code == 1
    assert "--log-with wandb needs the package wandb: pip install wandb, or drop --log-with." in " ".join(said.split())


def test_a_resumed_run_may_log_elsewhere(causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, tmp_path / "log", monkeypatch)
    settings = settings_for(causal, tmp_path, checkpoint_every=1)

    class Failing:
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_task(settings, callbacks=[Failing()])
    notes = Notes()
    train_task(settings.model_copy(update={"resume": True, "log_with": "trackio"}), watch=notes)
    assert "resumed at step 1 of 3" in notes.said
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "train/loss" in entry] == [2, 3]


class Killed:
    """Ends the process, as it were, after the log of a step that no checkpoint has."""

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_continues_the_run_of_its_tracker(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, tmp_path / "log", monkeypatch)
    settings = settings_for(causal, tmp_path, checkpoint_every=1, log_with="trackio", evaluate_every=3)
    with pytest.raises(KeyboardInterrupt):
        train_task(settings, callbacks=[Killed()])
    train_task(settings.model_copy(update={"resume": True}))
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    starts = [entry for entry in entries if "project" in entry]
    assert starts == [starts[0], starts[0] | {"resume": "allow"}]
    assert [entry["step"] for entry in entries if "train/loss" in entry] == [1, 2, 3]
    assert [entry["step"] for entry in entries if "dev/loss" in entry] == [3]
    assert not list(tmp_path.glob(".*/tracker.json"))


def test_a_run_of_wandb_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking as trackers

    starts: list[dict[str, Any]] = []

    class Tracker:
        def __init__(self, project: str, **more: Any) -> None:
            starts.append({"project": project, **more})
            self.tracker = SimpleNamespace(id=more.get("id", f"id{len(starts)}"))

        def start(self) -> None: ...

        def finish(self) -> None: ...

    monkeypatch.setattr(trackers, "LOGGER_TYPE_TO_CLASS", {"wandb": Tracker})
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    settings = TaskSettings(base="base", task="slots", train=["x"], out=str(tmp_path / "out"), log_with="wandb")
    for resumed in (False, True, True, False):
        with tracking(settings, ALONE, SILENT, folder=tmp_path / "work", resumed=resumed):
            pass
    new = {"project": "adaptermix", "name": "out"}
    assert starts == [new, *[new | {"resume": "allow", "id": "id1"}] * 2, new]


def test_tensorboard_is_started_as_accelerate_starts_it(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    settings = settings_for(causal, tmp_path, checkpoint_every=1, log_with="tensorboard")
    with pytest.raises(KeyboardInterrupt):
        train_task(settings, callbacks=[Killed()])
    notes = Notes()
    train_task(settings.model_copy(update={"resume": True}), watch=notes)
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"logs for TensorBoard are in {folder}" in notes.said
    assert list(folder.glob("events.out.tfevents.*"))
