"""The state of a run on disk: one file that is replaced at once, so a kill leaves the previous one or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import OutputError
from ..io.disk import sync
from ..io.files import check_output, partial_path, real_path, remove_partial
from ..io.json_types import JsonObject
from ..io.temporary import when_written
from .report import LogEntry

_FILE = "checkpoint.safetensors"
_LOOK = "look-{}.safetensors"
_UNFINISHED = ".tmp*"
"""Files of safetensors that a killed process had not renamed yet."""
TRACKER_FILE = "tracker.json"
"""File in the same folder on the run of a tracker; see `callbacks.TrackedRun`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """State from which a run resumes; all randomness is a function of the seed and the step.

    Args:
        step: Optimizer steps done.
        tensors: Factors and optimizer moments by name.
        history: Log entries so far.
    """

    step: int
    tensors: Mapping[str, Tensor]
    history: list[LogEntry] = field(default_factory=list)


class Workplace:
    """The folder next to an output that holds its unfinished run.

    Args:
        out: The output folder.
        settings: Settings of the run as plain data; resuming with others is refused.
    """

    def __init__(self, out: Path, settings: JsonObject) -> None:
        self.folder = partial_path(out.absolute())
        self._out = out
        self._settings = json.loads(json.dumps(settings, sort_keys=True))

    def open(self, *, resume: bool, overwrite: bool) -> Checkpoint | None:
        """Check the folder, empty it with `overwrite`, and return the checkpoint to resume from, if any.

        Raises:
            OutputError: the output exists; there is an interrupted run and neither flag is set; or it was run with
                other settings.
        """
        if resume and self._out.exists() and not overwrite:
            waiting = (self.folder / _FILE).exists()
            raise OutputError(
                f"{self._out} is already complete; "
                + (
                    "pass --resume --overwrite to continue the interrupted run that will replace it."
                    if waiting
                    else "no run can be resumed. Pass --overwrite to redo it."
                ),
                code="run.complete",
            )
        check_output(self._out, overwrite=overwrite)
        if (self.folder / _FILE).exists() and not resume:
            if not overwrite:
                raise OutputError(
                    f"an interrupted run for {self._out} is in {self.folder}. "
                    "Pass --resume to continue it, or --overwrite to start again (in a recipe: overwrite: true).",
                    code="run.interrupted",
                )
            self.clear()
        return self._load() if resume and (self.folder / _FILE).exists() else None

    def _load(self) -> Checkpoint:
        path = self.folder / _FILE
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["adaptermix"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            before, step, history = dict(header["settings"]), int(header["step"]), list(header["history"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise OutputError(
                f"{path} must be a checkpoint of adaptermix: {error}. Pass --overwrite to start again.",
                code="run.not-checkpoint",
            ) from error
        changed = sorted(k for k in {*before, *self._settings} if before.get(k) != self._settings.get(k))
        if changed:
            pairs = ", ".join(f"{key} was {before.get(key)!r}, now {self._settings.get(key)!r}" for key in changed)
            raise OutputError(
                f"an interrupted run can be resumed only with its own settings: {pairs}. "
                "Give those, or pass --overwrite to start again.",
                code="run.settings",
            )
        return Checkpoint(step=step, tensors=tensors, history=history)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint.

        Raises:
            OutputError: it cannot be written; the one before stays.
        """
        header = {"step": checkpoint.step, "history": checkpoint.history, "settings": self._settings}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{_FILE}.new"
        try:
            save_file(dict(checkpoint.tensors), temporary, metadata={"adaptermix": json.dumps(header)})
            sync(temporary)
            os.replace(temporary, self.folder / _FILE)
            sync(self.folder)
        except (SafetensorError, OSError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                self.folder.rmdir()  # an earlier checkpoint keeps it
            raise OutputError(
                f"the checkpoint of step {checkpoint.step} must fit on the disk, and could not be written to "
                f"{self.folder} ({error}). Free some space, and continue from the previous one with --resume.",
                code="run.checkpoint-disk",
            ) from error

    def keep_look(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the factors of a measurement of dev data until the output is written.

        Raises:
            OutputError: they cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _LOOK.format(step)
        try:
            save_file(dict(tensors), path)
        except (SafetensorError, OSError) as error:
            path.unlink(missing_ok=True)
            raise OutputError(
                f"the look at step {step} must fit on the disk, and could not be written to {self.folder} ({error}). "
                "Free some space, and continue with --resume.",
                code="run.checkpoint-disk",
            ) from error

    def look(self, step: int) -> dict[str, Tensor]:
        """Return the factors of a measurement of dev data."""
        return load_file(self.folder / _LOOK.format(step))

    def cleared_when_written(self) -> AbstractContextManager[None]:
        """Let the output that the block writes be followed at once by `clear`."""
        return when_written(real_path(self._out), self.clear)

    def clear(self) -> None:
        """Remove checkpoint and looks."""
        patterns = (f"{_FILE}*", f"{TRACKER_FILE}*", _LOOK.format("*"), _UNFINISHED)
        remove_partial(self._out.absolute(), *patterns)
