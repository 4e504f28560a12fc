"""Callbacks with the protocol of transformers' `TrainerCallback`, and trackers of experiments (`--log-with`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..errors import PlanError, as_line
from ..options import TrainingSettings
from ..progress import Watcher
from .parallel import Processes


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
        callbacks: Sequence[Any],
        settings: TrainingSettings,
        *,
        steps: int,
        processes: Processes,
        **objects: Any,
    ) -> None:
        from transformers import TrainerControl, TrainerState

        self._callbacks, self._settings, self._objects = callbacks, settings, objects
        self.state: Any = TrainerState(
            max_steps=steps,
            logging_steps=1,
            save_steps=settings.checkpoint_every,
            train_batch_size=settings.batch_size,
            is_local_process_zero=processes.main,
            is_world_process_zero=processes.main,
        )
        self.control: Any = TrainerControl()

    def __call__(self, event: str, **more: Any) -> None:
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


@contextmanager
def tracking(settings: TrainingSettings, processes: Processes, watch: Watcher) -> Iterator[list[Any]]:
    """Return the callback of the tracker that the settings name, if any; close the tracker at the end.

    Raises:
        PlanError: the tracker does not start.
    """
    if settings.log_with is None or not processes.main:
        yield []
        return
    callback = TrackerCallback(_start(settings, watch), watch)
    try:
        yield [callback]
    finally:
        callback.finish()


def _start(settings: TrainingSettings, watch: Watcher) -> Any:
    """Start a tracker of accelerate: a folder of TensorBoard, or a run in a project of W&B or Trackio."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    name, out = str(settings.log_with), Path(settings.out).absolute()
    PartialState(cpu=settings.device == "cpu" or not torch.cuda.is_available())  # accelerate's logger needs it
    try:
        if name == "tensorboard":
            # A folder of its own for every start, as transformers has it: TensorBoard would mix the curves of two.
            run = f"{out.name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
            tracker = LOGGER_TYPE_TO_CLASS[name](run, logging_dir=out.parent / "runs")
        else:
            project = os.environ.get(f"{name.upper()}_PROJECT", "adaptermix")  # as in transformers
            tracker = LOGGER_TYPE_TO_CLASS[name](project, name=out.name)
        tracker.start()
    except Exception as error:  # each tracker raises other classes
        raise PlanError(
            f"--log-with {name} does not start: {as_line(error)}. Fix that, or drop --log-with.", code="log.failed"
        ) from error
    if name == "tensorboard":
        watch.note(f"logs for TensorBoard are in {out.parent / 'runs' / run}")
    return tracker


class TrackerCallback:
    """Sends settings, log entries and dev values to a tracker of accelerate.

    A tracker that fails, for example since its server is gone, does not end the training: a note says so, and nothing
    more is sent.

    Args:
        tracker: A started `accelerate.tracking.GeneralTracker`.
        watch: Receives the note.
    """

    def __init__(self, tracker: Any, watch: Watcher) -> None:
        self._tracker, self._watch = tracker, watch
        self._works = True

    def _send(self, method: str, *values: Any, **more: Any) -> None:
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

    def on_train_begin(self, args: TrainingSettings, *_: Any, **__: Any) -> None:
        """Send the settings."""
        plan = args.model_dump(mode="json", exclude_none=True)
        self._send(
            "store_init_configuration",
            {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in plan.items()},
        )

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Send a step's numbers, such as `train/loss`."""
        parts = {f"train/{name}_loss": part["loss"] for name, part in logs.get("objectives", {}).items()}
        numbers = {
            f"train/{name}": value for name, value in logs.items() if name != "step" and isinstance(value, int | float)
        }
        self._send("log", numbers | parts, step=state.global_step)

    def on_evaluate(self, _args: Any, state: Any, _control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Send dev values, such as `dev/loss`."""
        values = {f"dev/{name.removeprefix('dev_')}": value for name, value in metrics.items()}
        self._send("log", values, step=state.global_step)
