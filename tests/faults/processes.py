"""The command line in a process of its own, with one fault at a chosen file operation.

Processes are forked from a server that has already imported the heavy libraries, so that a start costs milliseconds.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_START = multiprocessing.get_context("forkserver")
_SECONDS = 120.0
"""Time limit of a command."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate", "os.symlink", "os.link")
_PRELOADED = (
    *("torch", "peft", "optuna", "scipy.linalg", "transformers.models.llama.modeling_llama"),
    *("transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert", "bitsandbytes"),
    *("adaptermix.cli.run_recipes", "adaptermix.cli.show_training", "adaptermix.weight_search", "adaptermix.training"),
    *("adaptermix.tuning", "adaptermix.baking.run", "adaptermix.merge_statistics.run"),
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a process, and when.

    Args:
        deed: `none`, `kill`, `interrupt`, `interrupt-twice`, `terminate`, `full` (no file can grow from there on),
            `fill` (a file takes all that is free on the disk), `files` (at most `size` open files), `memory` (at most
            `size` more bytes of address space), `read-only` (permissions are valid for root too) or `two` (the same
            command runs twice at once).
        call: Number of the file operation before which it happens; 0 is the start.
        seconds: Time after which the process gets the signal, instead of a file operation.
        size: Limit of `full`, in bytes of a file, and of `files` and `memory`.
    """

    deed: str = "none"
    call: int = 0
    seconds: float | None = None
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Args:
        code: Exit code; negative for a signal that it did not handle.
        text: What it printed on stdout and stderr.
        calls: Number of file operations under its folder; 0 if it was killed.
        seconds: Its duration.
    """

    code: int
    text: str
    calls: int
    seconds: float


SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
NUMBERS = {**SIGNALS, "interrupt-twice": signal.SIGINT}
TOKEN = "hf_Secret0fTheFaultTrials"  # noqa: S105  (not a real one)
"""Token of the Hub in the environment of each process; no output may contain it."""
BALLAST = "ballast"
"""File that fills a disk."""
_CAPABILITIES = 0x20080522
"""Version 3 of Linux's sets of capabilities."""
_OVERRIDES = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root writes and reads all files."""


def preload(set_variable: Callable[[str, str], object] = os.environ.__setitem__) -> None:
    """Let the server of new processes import what the commands need, once.

    Args:
        set_variable: Sets an environment variable of this process, which the others inherit.
    """
    quiet = ("OMP_NUM_THREADS", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE")
    for name in quiet:
        set_variable(name, "1")
    set_variable("TOKENIZERS_PARALLELISM", "false")
    _START.set_forkserver_preload([*_PRELOADED, __name__])


def _fill(folder: Path) -> None:
    """Take all space of a disk, which must be small."""
    handle = os.open(folder / BALLAST, os.O_WRONLY | os.O_CREAT)
    for size in (2**20, 2**12, 1):
        with suppress(OSError):
            while True:
                os.write(handle, b"x" * size)
    os.close(handle)


def _obey_permissions() -> None:
    """Give up what lets root write into read-only folders."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        for index in range(3):
            sets[index] &= ~_OVERRIDES
        if libc.capset(header, sets) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def _do(fault: Fault) -> None:
    if fault.deed in NUMBERS:
        for _ in range(2 if fault.deed == "interrupt-twice" else 1):
            os.kill(os.getpid(), NUMBERS[fault.deed])
    elif fault.deed == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif fault.deed == "fill":
        _fill(Path.cwd())
    elif fault.deed == "read-only":
        _obey_permissions()
    elif fault.deed == "files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (fault.size, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    elif fault.deed == "memory":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + fault.size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _watch(folder: str, fault: Fault) -> list[int]:
    """Do the deed before the chosen operation on a file of the folder; return the list that counts them."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _mode, flags = arguments
            if not (isinstance(flags, int) and flags & _WRITES):
                return
        elif event in _CHANGES:
            path = arguments[0]
        elif event == "ctypes.dlopen" and arguments[0] is None:  # the exchange of two folders
            path = ""
        else:
            return
        if isinstance(path, bytes | str | os.PathLike):
            name = os.fsdecode(path)
            if name.startswith("/") and not name.startswith(folder):
                return
        count[0] += 1
        if count[0] == fault.call:
            _do(fault)

    sys.addaudithook(hook)
    return count


def _child(arguments: Sequence[str], folder: str, fault: Fault, out: Connection, report: Connection) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    temporary = Path(folder, "tmp")
    temporary.mkdir(exist_ok=True)
    os.environ |= {"ADAPTERMIX_STATE": f"{folder}/state", "TMPDIR": str(temporary), "HF_TOKEN": TOKEN}
    tempfile.tempdir = None  # The server may have looked it up.
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    out.close()
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    from adaptermix import cli

    report.send(0)
    count = _watch(folder, fault)
    sys.argv = ["adaptermix", *arguments]
    if not fault.call and fault.seconds is None:
        _do(fault)
    try:
        cli.main()
    finally:
        report.send(count[0])


def run(arguments: Sequence[str], folder: Path, fault: Fault | None = None) -> Ended:
    """Run a command in a folder, and wait for its end."""
    fault = fault or Fault()
    mine, its = _START.Pipe()
    counted, counts = _START.Pipe(duplex=False)
    process = _START.Process(target=_child, args=(list(arguments), str(folder), fault, its, counts))
    process.start()
    its.close()
    counts.close()
    counted.recv()  # It has started; a signal before that would end Python itself.
    started = time.monotonic()
    text, due = b"", fault.seconds
    while True:
        passed = time.monotonic() - started
        if due is not None and passed >= due:
            os.kill(process.pid or 0, NUMBERS[fault.deed])
            due = None
        if passed > _SECONDS:
            os.kill(process.pid or 0, signal.SIGUSR1)  # It shows where it hangs.
            time.sleep(1)
            process.kill()
        wait = 1.0 if due is None else max(0.0, min(1.0, due - passed))
        if select.select([mine.fileno()], [], [], wait)[0]:
            try:
                part = os.read(mine.fileno(), 2**16)
            except ConnectionResetError:
                part = b""
            if not part:
                break
            text += part
    process.join(_SECONDS)
    mine.close()
    calls = 0
    if counted.poll(0):
        try:
            calls = counted.recv()
        except EOFError:
            calls = 0
    counted.close()
    code = process.exitcode if process.exitcode is not None else -signal.SIGALRM
    return Ended(code=code, text=text.decode(errors="replace"), calls=calls, seconds=time.monotonic() - started)
