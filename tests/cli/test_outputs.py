"""Outputs under kills, signals, limits and rivals: real processes, one command at a time."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests.factories import contents, without_card_hash, write_lora

_START = multiprocessing.get_context("forkserver")
PATHS = {f"model.layers.{n}.self_attn.q_proj": (24, 16, 4) for n in range(3)}


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """Let the server of new processes import what they need, once."""
    _START.set_forkserver_preload(["torch", "adaptermix.cli.show_adapters", "adaptermix.weight_search", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, PATHS, seed=number)
    return tmp_path


_CALLS = ("replace", "rename", "mkdir", "open", "fsync", "chmod", "rmdir", "unlink", "remove")


def _at_call(number: int, then: Callable[[], None]) -> list[int]:
    """Do something just before the n-th file operation of this process; return the list that counts them."""
    count = [0]
    for name in _CALLS:
        real = getattr(os, name)

        def call(*arguments: Any, _real: Any = real, **more: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                then()
            return _real(*arguments, **more)

        setattr(os, name, call)
    from adaptermix.io import files

    swap = files.exchange

    def exchange(first: Path, second: Path) -> bool:
        count[0] += 1
        if count[0] == number:
            then()
        return swap(first, second)

    files.exchange = exchange
    return count


def _signal(number: int, times: int = 1) -> Callable[[], None]:
    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return send


def child(arguments: Sequence[str], log: Path, call: int, deed: str, can_exchange: bool, ready: Any, go: Any) -> None:
    """The real command line, with stdout and stderr in one file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    from adaptermix import cli
    from adaptermix.io import files

    if not can_exchange:
        files.exchange = lambda first, second: False

    def wait() -> None:
        ready.set()
        go.wait()

    deeds: dict[str, Callable[[], None]] = {
        "kill": _signal(signal.SIGKILL),
        "interrupt": _signal(signal.SIGINT),
        "interrupt twice": _signal(signal.SIGINT, 2),
        "terminate": _signal(signal.SIGTERM),
        "wait": wait,
        "nothing": lambda: None,
    }
    if deed.startswith("limit "):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(deed.split()[1]),) * 2)
    counted = _at_call(call, deeds.get(deed, deeds["nothing"]))
    import sys

    sys.argv = ["adaptermix", *map(str, arguments)]
    try:
        cli.main()
    finally:
        if deed == "nothing":
            log.with_suffix(".count").write_text(str(counted[0]))


def start(
    folder: Path, *arguments: Any, call: int = 0, deed: str = "nothing", can_exchange: bool = True, log: str = "log"
) -> tuple[ForkServerProcess, Any, Any]:
    ready, go = _START.Event(), _START.Event()
    given = (list(map(str, arguments)), folder / log, call, deed, can_exchange, ready, go)
    process = _START.Process(target=child, args=given)
    process.start()
    return process, ready, go


def run(folder: Path, *arguments: Any, **more: Any) -> tuple[int, str]:
    process, *_events = start(folder, *arguments, **more)  # they must outlive the start
    process.join(120)
    assert process.exitcode is not None
    log = folder / more.get("log", "log")
    return process.exitcode, log.read_text(errors="replace") if log.exists() else ""


def merge(folder: Path, out: str = "out", weight: float = 0.5, *more: Any) -> list[Any]:
    return ["merge", folder / "task", folder / "align", "--weights", weight, "--out", folder / out, *more]


def count(folder: Path, *arguments: Any, **more: Any) -> int:
    """Return how many file operations a command makes."""
    code, said = run(folder, *arguments, **more)
    assert code == 0, said
    return int((folder / "log.count").read_text())


def output(folder: Path) -> dict[str, bytes | None]:
    """Everything in an output but its card, which has the folder's name, and the hash of the card."""
    return {
        name: content and without_card_hash(content)
        for name, content in contents(folder).items()
        if name != "README.md"
    }


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_output_and_the_next_run_clears_up(
    folder: Path, overwrite: bool, can_exchange: bool
) -> None:
    more = ["--overwrite"] if overwrite else []
    assert run(folder, *merge(folder, "new", 0.9))[0] == 0
    assert run(folder, *merge(folder, "old", 0.5))[0] == 0
    new, old = output(folder / "new"), output(folder / "old")
    assert new != old
    if overwrite:
        shutil.copytree(folder / "old", folder / "out")
    calls = count(folder, *merge(folder, "out", 0.9, *more), can_exchange=can_exchange)
    tried = range(2, calls + 1, max(1, calls // 7)) if overwrite else range(3, calls + 1, max(1, calls // 4))
    for call in [*tried, calls]:
        shutil.rmtree(folder / "out", ignore_errors=True)
        if overwrite:
            shutil.copytree(folder / "old", folder / "out")
        code, said = run(folder, *merge(folder, "out", 0.9, *more), call=call, deed="kill", can_exchange=can_exchange)
        assert code == -signal.SIGKILL, said
        if can_exchange or not overwrite:
            there = output(folder / "out") if (folder / "out").exists() else None
            assert there in ([old, new] if overwrite else [None, new]), call
        if there_already := (folder / "out").exists() and not overwrite:
            continue
        assert not there_already
        code, said = run(folder, *merge(folder, "out", 0.9, *more), can_exchange=can_exchange)
        assert code == 0, said
        assert output(folder / "out") == new
        hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert hidden == [], (call, hidden)


@pytest.mark.parametrize("deed", ["interrupt", "interrupt twice", "terminate"])
def test_signals_at_any_file_operation_leave_nothing_and_no_traceback(folder: Path, deed: str) -> None:
    calls = count(folder, *merge(folder, "first", 0.9))
    whole = output(folder / "first")
    for call in [*range(1, calls + 1, max(1, calls // 5)), calls]:
        shutil.rmtree(folder / "out", ignore_errors=True)
        code, said = run(folder, *merge(folder, "out", 0.9), call=call, deed=deed)
        assert "Traceback" not in said, (call, said)
        assert len(said.strip().splitlines()) <= 10
        if code == 0:
            assert output(folder / "out") == whole, call
        else:
            assert code == 130, (call, said)
            assert not (folder / "out").exists() or output(folder / "out") == whole
        hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert hidden == [], (call, hidden)


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000])
def test_a_limit_of_file_sizes_is_told_in_one_sentence_and_leaves_nothing(folder: Path, limit: int) -> None:
    code, said = run(folder, *merge(folder, "out", 0.5, "--json"), deed=f"limit {limit}")
    # nothing can be said in a file of no size
    assert code == 1
    assert "Traceback" not in said
    assert not (folder / "out").exists()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_of_two_merges_into_one_output_the_second_is_refused(folder: Path, more: list[str]) -> None:
    first, ready, go = start(folder, *merge(folder, "out", 0.9, *more), call=4, deed="wait")
    try:
        assert ready.wait(60)
        code, said = run(folder, *merge(folder, "out", 0.1, *more), log="log2")
        assert code == 1
        assert said.startswith("error: another process is working on")
        assert said.count("\n") == 1
    finally:
        go.set()
        first.join(60)
    assert first.exitcode == 0, (folder / "log").read_text()
    found = json.loads((folder / "out" / "adaptermix.json").read_text())
    assert found["plan"]["weights"] == [0.9, pytest.approx(0.1)]


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (".", "an output must be a separate folder|must not hold an input"),
        ("..", "must not hold an input|an output must be a separate folder"),
        ("task", "must not be one of the inputs"),
        ("task/", "must not be one of the inputs"),
        ("out/../task", "must not be one of the inputs"),
        ("link", "must not be one of the inputs"),
        ("to-out", "is a link to"),
        ("holder", "must not hold an input"),
        ("holder-link/../holder", "must not hold an input"),
        ("file", "is a file"),
        ("notes", "also contains 'thesis.tex'"),
        ("plain", "only an adapter folder can be overwritten"),
        ("task/adapter_config.json/x", "is not a writable folder|cannot be made"),
    ],
)
def test_what_must_not_be_replaced_is_not(folder: Path, out: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    assert run(folder, *merge(folder, "out"))[0] == 0
    shutil.copytree(folder / "out", folder / "notes")
    (folder / "notes" / "thesis.tex").write_text("years of work")
    shutil.copytree(folder / "out", folder / "holder")
    shutil.copytree(folder / "align", folder / "holder" / "align")
    (folder / "holder-link").symlink_to("holder")
    (folder / "plain").mkdir()
    (folder / "plain" / "x").write_text("x")
    (folder / "link").symlink_to("task")
    (folder / "to-out").symlink_to("out")
    (folder / "file").write_text("x")
    before = contents(folder)
    with contextlib.chdir(folder):
        arguments = ["merge", "task", "holder/align", "--weights", "0.5", "--out", out, "--overwrite"]
        code, said = run(folder, *arguments)
    assert code == 1, said
    assert re.search(says, said), said
    assert said.count("\n") == 1
    after = contents(folder)
    assert {name: after[name] for name in after if not name.startswith("log")} == {
        name: before[name] for name in before if not name.startswith("log")
    }


def test_predictions_do_not_replace_the_data(folder: Path) -> None:
    (folder / "dev.en.jsonl").write_text("{}\n")
    own = ["--base", "b", "--task", "slots", "--data", folder / "dev.en.jsonl"]
    code, said = run(folder, "evaluate", *own, "--predictions", folder / "dev.en.jsonl", "--overwrite")
    assert code == 1
    assert "an output must not be one of the inputs" in said
    assert (folder / "dev.en.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_predictions_do_not_replace_a_file_of_the_adapter_that_is_evaluated(folder: Path, name: str) -> None:
    (folder / "dev.en.jsonl").write_text("{}\n")
    before = (folder / "task" / name).read_bytes()
    own = ["--base", "b", "--adapter", folder / "task", "--task", "slots", "--data", folder / "dev.en.jsonl"]
    code, said = run(folder, "evaluate", *own, "--predictions", folder / "task" / name, "--overwrite")
    assert code == 1
    assert "an output must not be part of an input" in said
    assert (folder / "task" / name).read_bytes() == before


def test_an_interrupt_that_is_swallowed_is_raised_again() -> None:
    from adaptermix.cli.signals import Interrupts

    process = _START.Process(target=swallowing, args=(Interrupts,))
    process.start()
    process.join(60)
    assert process.exitcode == 7


def swallowing(kind: Any) -> None:
    interrupts = kind()
    interrupts.install()
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGINT)
    try:
        threading.Event().wait(60)
    except KeyboardInterrupt:
        os._exit(7)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
@pytest.mark.parametrize(
    ("command", "stream"),
    [
        ("inspect task --json --quiet", "stdout"),
        ("inspect none --json", "stdout"),
        ("inspect task", "stderr"),
        ("-h", "stdout"),
    ],
)
def test_a_stream_that_takes_nothing_ends_the_command_without_a_traceback(
    folder: Path, command: str, stream: str
) -> None:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Path("/dev/full").open("w") as full:
        streams[stream] = full
        line = [sys.executable, "-m", "adaptermix", *command.split()]
        found = subprocess.run(line, cwd=folder, text=True, timeout=300, check=False, **streams)
    said = (found.stdout or "") + (found.stderr or "")
    assert found.returncode == 1
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert said.count("\n") <= 1
