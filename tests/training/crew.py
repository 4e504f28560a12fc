"""The command line in several processes, as a launcher starts them, from one warm process."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

_START = multiprocessing.get_context("forkserver")
_PRELOAD = ("torch", "transformers.models.llama", "peft", "accelerate", "adaptermix.training", __name__)


def fail_at(step: int) -> None:
    """Let this process fail in a step's loss, and only this one."""
    from adaptermix.errors import DataError
    from adaptermix.training import task

    real = task.TaskLoss.__call__

    def call(self: task.TaskLoss, number: int) -> object:
        if number + 1 == step:
            raise DataError("the rows of this process must be read, and one is broken.")
        return real(self, number)

    task.TaskLoss.__call__ = call


def eager() -> None:
    """Compile with the compiler's front end alone; its back end takes long, and is not ours."""
    import torch

    real = torch.compile
    torch.compile = lambda function, **options: real(function, **(options | {"backend": "eager"}))


def size() -> None:
    """Say how many of the blocks' weights this process holds."""
    from adaptermix.models.blocks import blocks
    from adaptermix.training import sharding

    real = sharding.shard

    def shard(base: Any, *arguments: Any) -> None:
        real(base, *arguments)
        held = sum(p.to_local().numel() for p in blocks(base.model)[1].parameters())
        print(f"of the blocks here: {held}", flush=True)  # noqa: T201

    sharding.shard = shard


def stop(event: str) -> None:
    """Let a callback of this process, and only of this one, stop the training at an event."""
    from adaptermix.training import callbacks

    real = callbacks.Callbacks.__call__

    def call(self: callbacks.Callbacks, name: str, **more: Any) -> None:
        real(self, name, **more)
        self.control.should_training_stop |= name == event

    callbacks.Callbacks.__call__ = call  # type: ignore[method-assign]


EVENTS = ("on_train_begin", "on_step_begin", "on_step_end", "on_save")
DEEDS: dict[str, Callable[[], None]] = {"fail at 3": lambda: fail_at(3), "eager": eager, "size": size}
DEEDS |= {event: partial(stop, event) for event in EVENTS}


def child(arguments: Sequence[str], environment: Mapping[str, str], log: Path, deed: str) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    import torch

    from adaptermix.cli import main

    torch.set_num_threads(1)
    if deed:
        DEEDS[deed]()
    main(list(arguments))


class Crew:
    """Starts the same command in each process.

    Args:
        log: File of what all of them say.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        _START.set_forkserver_preload(list(_PRELOAD))

    def start(
        self, arguments: Sequence[str], *, count: int = 2, deeds: Mapping[int, str] | None = None, **more: str
    ) -> list[ForkServerProcess]:
        self.log.write_text("")
        # launchers keep the store themselves, so that it outlives every process
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = []
        for rank in range(count):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            environment = {name: str(value) for name, value in (names | place).items()} if count > 1 else {}
            process = _START.Process(
                target=child, args=(arguments, environment | more, self.log, (deeds or {}).get(rank, ""))
            )
            process.start()
            processes.append(process)
        return processes

    def end(self, processes: Sequence[ForkServerProcess]) -> list[int | None]:
        for process in processes:
            process.join(120)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert None not in codes, self.log.read_text()
        return codes

    def run(
        self, arguments: Sequence[str], *, count: int = 2, deeds: Mapping[int, str] | None = None, **more: str
    ) -> list[int | None]:
        return self.end(self.start(arguments, count=count, deeds=deeds, **more))
