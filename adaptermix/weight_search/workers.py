"""The worker processes that run trials of a search."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ..options import SearchSettings
from ..progress import Watcher

_PATIENCE = 20.0
"""Seconds to wait for workers to end before they are killed."""


def _device(settings: SearchSettings, number: int) -> str:
    """Return the device of a worker: one GPU after the other, unless the settings name one."""
    import torch

    if settings.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        return f"cuda:{number % torch.cuda.device_count()}"
    return settings.device


def _threads(count: int) -> str:
    """Return the number of threads for each of `count` processes."""
    return str(max(1, len(os.sched_getaffinity(0)) // count)) if hasattr(os, "sched_getaffinity") else "1"


@contextmanager
def start_workers(settings: SearchSettings, watch: Watcher) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the other workers of a search, and wait for their end.

    If one dies, a note names it, and another one runs its trial.
    """
    started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    environment = os.environ | {"OMP_NUM_THREADS": _threads(settings.workers), "TOKENIZERS_PARALLELISM": "false"}
    for number in range(1, settings.workers):
        options = settings.model_copy(update={"device": _device(settings, number), "workers": 1, "overwrite": False})
        errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (It is closed below.)
        command = [sys.executable, "-m", "adaptermix.weight_search.worker", str(number), str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors, env=environment)
        if process.stdin:
            process.stdin.write(options.model_dump_json().encode())
            process.stdin.close()
        # A dead process must be reaped for the others to see that it is gone.
        threading.Thread(target=process.wait, daemon=True).start()
        started.append((process, errors))
    try:
        yield [process for process, _ in started]
        end = time.monotonic() + _PATIENCE
        while any(process.poll() is None for process, _ in started) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        for number, (process, errors) in enumerate(started, start=1):
            if process.poll() is None:
                process.kill()
                process.wait()
            elif process.returncode:
                errors.seek(0)
                output = errors.read().decode(errors="replace").strip().splitlines()
                watch.note(
                    f"warning: worker {number} ended with {process.returncode}; others run its trial."
                    + (f" Its last output: {output[-1]}" if output else "")
                )
            errors.close()
