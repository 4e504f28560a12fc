"""Whether the process that runs a trial is still alive."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from .storage import is_number

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STALE_AFTER = 120.0
"""Seconds without a heartbeat after which a worker on another machine counts as dead."""
_UNSIGNED = 5.0
"""Seconds after which a trial without its worker's name counts as dead; workers sign within milliseconds."""
_CLOCK = 5.0
"""Seconds by which the start time of one process may seem to move when the clock is set."""


def worker_of(trial: FrozenTrial) -> tuple[str | None, int, str | None, float | None]:
    """Return host, process, token and start time of a trial's worker, and None for unknown ones."""
    match trial.user_attrs.get("worker"):
        case [str(host), int(process), str(token), *rest]:
            start = rest[0] if rest and is_number(rest[0]) else None
            return host, process, token, start
    return None, 0, None, None


def started(process: int) -> float | None:
    """Return the start time of a process, which differs from a later one with the same number."""
    import psutil

    try:
        return float(psutil.Process(process).create_time())
    except psutil.Error:
        return None


def works(trial: FrozenTrial) -> bool:
    """Return whether the worker of a trial that another store started is alive."""
    start_time = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    host, process, _, start = worker_of(trial)
    if host is None:  # It ended between the trial's start and its signature, or is about to sign.
        return time.time() - start_time < _UNSIGNED
    if host != socket.gethostname():
        beat = trial.user_attrs.get("beat", start_time)
        return is_number(beat) and time.time() - float(beat) < STALE_AFTER
    if process == os.getpid():  # The trial is of an earlier search in this process, or from before a restart.
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    now = started(process)
    return start is None or now is None or abs(now - start) < _CLOCK
