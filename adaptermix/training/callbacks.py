"""Callbacks with the protocol of transformers' `TrainerCallback`, and trackers of experiments (`--log-with`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import PlanError, as_line
from ..options import TrainingSettings
from ..progress import Watcher, run_name
from .checkpoint import TRACKER_FILE
from .parallel import Processes
from .report import LogEntry

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from transformers import TrainerState


class Callbacks:
    """Calls the callbacks of a run.

    A callback has any of the methods `on_train_begin`, `on_step_begin`, `on_step_end`, `on_log`, `on_evaluate`,
    `on_save` and `on_train_end`, such as a `transformers.TrainerCallback`. Each gets the settings (where transformers
    passes its arguments), the state, the control, and `model`, `optimizer` and `lr_scheduler` by name; `on_log` gets
    `logs` and `on_evaluate` gets `metrics` too. After each step the trainer reads `should_training_stop`,
    `should_evaluate` and `should_save` of the control; if one process sets them, they hold for all.

    Args:
        callbacks: The callbacks.
        settings: The run's settings.
        steps: Planned optimizer steps.
        processes: The processes that share the run; each has its own callbacks.
        objects: Further arguments of every call.
    """

    def __init__(
        self,
        callbacks: Sequence[object],
        settings: TrainingSettings,
        *,
        steps: int,
        processes: Processes,
        **objects: object,
    ) -> None:
        from transformers import TrainerControl, TrainerState

        self._callbacks, self._settings, self._objects = callbacks, settings, objects
        self.state = TrainerState(
            max_steps=steps,
            logging_steps=1,
            save_steps=settings.checkpoint_every,
            train_batch_size=settings.batch_size,
            is_local_process_zero=processes.main,
            is_world_process_zero=processes.main,
        )
        self.control = TrainerControl()

    def __call__(self, event: str, **more: object) -> None:
        """Call a method of all callbacks that have it."""
        for callback in self._callbacks:
            if method := getattr(callback, event, None):
                changed = method(self._settings, self.state, self.control, **self._objects, **more)
                self.control = changed or self.control


def require_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        PlanError: the package is not installed.
    """
    if name is None:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    if LoggerType(name) not in get_available_trackers():
        raise PlanError(
            f"--log-with {name} needs the package {name}: pip install {name}, or drop --log-with.",
            code="log.no-package",
        )


class TrackedRun:
    """The run that a tracker shows, and the steps that it has received: a file next to the checkpoint.

    A resumed training continues this run, and sends no step twice.

    Args:
        path: The file.
        tracker: Name of the tracker.
        resumed: Whether the training continues from a checkpoint; else the file is ignored.
    """

    def __init__(self, path: Path, tracker: str, *, resumed: bool) -> None:
        self._path, self._values = path, {"tracker": tracker, "run": ""}
        self.sent: dict[str, int] = {}
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if resumed and known["tracker"] == tracker:
                self._values["run"] = str(known["run"])
                self.sent = {str(kind): int(step) for kind, step in known["sent"].items()}

    @property
    def name(self) -> str:
        """Id or folder of the run; empty for a new one."""
        return self._values["run"]

    def started(self, name: str) -> None:
        """Note the id or the folder of the run."""
        self._values["run"] = name
        self._write()

    def add(self, kind: str, step: int) -> bool:
        """Note that a step is sent; return whether it is a new one.

        Args:
            kind: "train" or "dev".
            step: Optimizer steps done.
        """
        if step <= self.sent.get(kind, 0):
            return False
        self.sent[kind] = step
        self._write()
        return True

    def _write(self) -> None:
        temporary = self._path.with_name(f"{self._path.name}.new")
        with suppress(OSError):  # a full disk is the checkpoint's matter
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._values | {"sent": self.sent}), encoding="utf-8")
            temporary.replace(self._path)


@contextmanager
def tracking(
    settings: TrainingSettings, processes: Processes, watch: Watcher, *, folder: Path, resumed: bool
) -> Iterator[list[object]]:
    """Return the callback of the tracker that the settings name, if any; close the tracker at the end.

    Args:
        settings: The run's settings.
        processes: The processes that share the run; the main one logs.
        watch: Receives notes.
        folder: Folder of the checkpoint.
        resumed: Whether the training continues from a checkpoint.

    Raises:
        PlanError: the tracker does not start.
    """
    if settings.log_with is None or not processes.main:
        yield []
        return
    run = TrackedRun(folder / TRACKER_FILE, settings.log_with, resumed=resumed)
    callback = TrackerCallback(_start(settings, run, watch), watch, run)
    try:
        yield [callback]
    finally:
        callback.finish()


def _start(settings: TrainingSettings, run: TrackedRun, watch: Watcher) -> GeneralTracker:
    """Start a tracker of accelerate: a folder of TensorBoard, or a run in a project of W&B or Trackio."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    name, out = str(settings.log_with), Path(settings.out).absolute()
    PartialState(cpu=settings.device == "cpu" or not torch.cuda.is_available())  # accelerate's logger needs it
    try:
        if name == "tensorboard":
            # Each new run has its own folder, as in transformers: TensorBoard would mix the curves of two.
            label = run.name or f"{run_name(out)}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
            tracker = LOGGER_TYPE_TO_CLASS[name](label, logging_dir=out.parent / "runs")
        else:
            label = run_name(out)
            project = os.environ.get(f"{name.upper()}_PROJECT", "adaptermix")  # as in transformers
            same = {"resume": "allow"} | ({"id": run.name} if name == "wandb" else {}) if run.name else {}
            tracker = LOGGER_TYPE_TO_CLASS[name](project, name=label, **same)
        tracker.start()
    except Exception as error:  # each tracker raises other classes
        raise PlanError(
            f"--log-with {name} does not start: {as_line(error)}. Fix that, or drop --log-with.", code="log.failed"
        ) from error
    run.started(str(tracker.tracker.id) if name == "wandb" else label)
    if name == "tensorboard":
        watch.note(f"logs for TensorBoard are in {out.parent / 'runs' / label}")
    return tracker


class TrackerCallback:
    """Sends settings, log entries and dev values to a tracker of accelerate.

    A tracker that fails, for example since its server is gone, does not end the training: it gets no further values,
    and a note names the error.

    Args:
        tracker: A started `accelerate.tracking.GeneralTracker`.
        watch: Receives the note.
        run: The tracker's run, which has the steps of an interrupted training already.
    """

    def __init__(self, tracker: GeneralTracker, watch: Watcher, run: TrackedRun) -> None:
        self._tracker, self._watch, self._run = tracker, watch, run
        self._works = True

    def _send(self, method: str, *values: object, **more: object) -> None:
        if not self._works:
            return
        try:
            getattr(self._tracker, method)(*values, **more)
        except Exception as error:  # each tracker raises other classes
            self._works = False
            self._watch.note(f"warning: logging stopped, since the tracker failed: {as_line(error)}")

    def finish(self) -> None:
        """Close the tracker, also one that failed."""
        self._works = True
        self._send("finish")

    def on_train_begin(self, args: TrainingSettings, *_: object, **__: object) -> None:
        """Send the settings."""
        plan = args.model_dump(mode="json", exclude_none=True)
        self._send(
            "store_init_configuration",
            {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in plan.items()},
        )

    def on_log(self, _args: object, state: TrainerState, _control: object, logs: LogEntry, **_: object) -> None:
        """Send a step's numbers, such as `train/loss`."""
        parts = {f"train/{name}_loss": part["loss"] for name, part in logs.get("objectives", {}).items()}
        numbers = {
            f"train/{name}": value for name, value in logs.items() if name != "step" and isinstance(value, int | float)
        }
        if self._run.add("train", state.global_step):
            self._send("log", numbers | parts, step=state.global_step)

    def on_evaluate(
        self, _args: object, state: TrainerState, _control: object, metrics: dict[str, float], **_: object
    ) -> None:
        """Send dev values, such as `dev/loss`."""
        values = {f"dev/{name.removeprefix('dev_')}": value for name, value in metrics.items()}
        if self._run.add("dev", state.global_step):
            self._send("log", values, step=state.global_step)
