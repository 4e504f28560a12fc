"""A run that dies at a chosen instant: what is on disk then, and what comes of it.

The runs are children of one warm process, so that a start costs milliseconds and every instant can be tried.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from safetensors import safe_open

from adaptermix.io.files import partial_path
from tests.factories import without_card_hash

from .data import write_pairs, write_slots

_START = multiprocessing.get_context("forkserver")


def _before_replace(call: int, then: Callable[[], None]) -> None:
    """Do something just before the n-th file or folder is put in its place."""
    real, calls = os.replace, iter(range(1, 10**6))

    def replace(source: str | Path, target: str | Path) -> None:
        if next(calls) == call:
            then()
        real(source, target)

    os.replace = replace


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt_twice() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)


_DEEDS: dict[str, Callable[[], None]] = {"die": _die, "interrupt twice": _interrupt_twice}


def child(arguments: list[str], output: Path, call: int = 0, deed: str = "die") -> None:
    """The real command line, with stdout and stderr in one file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    import torch

    from adaptermix.cli import main

    torch.set_num_threads(1)
    if call:
        _before_replace(call, _DEEDS[deed])
    main(arguments)


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """Let the server of new processes import what they need, once."""
    names = [
        "torch",
        "transformers.models.llama",
        "peft",
        "adaptermix.cli.show_training",
        "adaptermix.training",
        __name__,
    ]
    _START.set_forkserver_preload(names)
    with pytest.MonkeyPatch.context() as patch:
        # what `main` sets comes too late for libraries that are warm
        for name in ("OMP_NUM_THREADS", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        yield


class Runs:
    """Commands on one tiny base model in one folder."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        common = ["--base", str(base), "--device", "cpu", "--dtype", "float32", "--batch-size", "3", "--rank", "2"]
        common += ["--checkpoint-every", "2", "--learning-rate", "0.01", "--dropout", "0.2"]
        rows, pairs = ["--task", "slots", "--train", write_slots(folder)], ["--pairs", *write_pairs(folder)]
        self._commands = {
            "task": ["train-task", *rows, *common],
            "align": ["train-align", *pairs, *common],
            "joint": ["train-joint", *rows, *pairs, *common],
        }

    def start(self, kind: str, out: Path, *more: str, call: int = 0, deed: str = "die") -> ForkServerProcess:
        arguments = [*self._commands[kind], "--out", str(out), *more]
        process = _START.Process(target=child, args=(arguments, self.log, call, deed))
        process.start()
        return process

    def finish(self, process: ForkServerProcess) -> int:
        process.join(60)
        assert process.exitcode is not None, self.log.read_text()
        return process.exitcode

    def run(self, kind: str, out: Path, *more: str, call: int = 0, deed: str = "die") -> int:
        return self.finish(self.start(kind, out, *more, call=call, deed=deed))


@pytest.fixture
def runs(causal: Path, tmp_path: Path) -> Runs:
    return Runs(causal, tmp_path)


def step_of(out: Path) -> int:
    """The step of the checkpoint, -1 if there is none; a damaged one is an error."""
    path = partial_path(out) / "checkpoint.safetensors"
    if not path.exists():
        return -1
    try:
        with safe_open(path, framework="pt") as file:
            return int(json.loads(file.metadata()["adaptermix"])["step"])
    except (OSError, RuntimeError):
        if path.exists():
            raise
        return -1  # the run has just ended and cleared its workplace


def same(one: Path, other: Path) -> bool:
    names = ("adapter_model.safetensors", "adapter_config.json", "adaptermix.json")
    return all(
        without_card_hash((one / name).read_bytes()) == without_card_hash((other / name).read_bytes()) for name in names
    )


@pytest.mark.parametrize("kind", ["task", "align"])
def test_a_run_killed_before_every_one_of_its_writes_ends_with_the_same_bytes(runs: Runs, kind: str) -> None:
    """The writes are checkpoints 2, 4 and 6, the history, and the whole folder; each is missed once."""
    whole, out = runs.folder / "whole", runs.folder / "out"
    assert runs.run(kind, whole, "--steps", "6") == 0
    seen = []
    for call in (1, 2, 2, 2, 2):
        assert runs.run(kind, out, "--steps", "6", "--resume", call=call) == -signal.SIGKILL, runs.log.read_text()
        assert not out.exists()
        seen.append(step_of(out))
    assert seen == [-1, 2, 4, 6, 6]
    assert runs.run(kind, out, "--steps", "6", "--resume") == 0, runs.log.read_text()
    assert same(whole, out)
    assert not partial_path(out).exists()


@pytest.mark.parametrize(("kind", "kills", "steps"), [("task", 10, 80), ("align", 4, 60), ("joint", 4, 60)])
def test_a_run_killed_at_random_instants_ends_with_the_same_bytes(
    runs: Runs, kind: str, kills: int, steps: int
) -> None:
    """Every checkpoint in between can be read, and none is older than the one before."""
    whole, out = runs.folder / "whole", runs.folder / "out"
    often = ["--steps", str(steps), "--checkpoint-every", "1"]
    assert runs.run(kind, whole, *often) == 0
    instants = random.Random(3)
    for kill in range(kills):
        before = step_of(out)
        process = runs.start(kind, out, *often, "--resume")
        if kill % 4:  # progress first, so that the test ends on a slow machine too; else anywhere in the start
            limit = time.monotonic() + 600
            while process.is_alive() and step_of(out) == before and time.monotonic() < limit:
                time.sleep(0.001)
            time.sleep(instants.uniform(0, 0.02))
        end = time.monotonic() + instants.uniform(0, 0 if kill % 4 else 0.5)
        while time.monotonic() < end and step_of(out) < before + 5:
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, runs.log.read_text()
        assert step_of(out) >= before
    assert 0 < step_of(out) < steps
    assert runs.run(kind, out, *often, "--resume") == 0, runs.log.read_text()
    assert same(whole, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on_to_the_same_bytes(runs: Runs, number: int) -> None:
    whole, out = runs.folder / "whole", runs.folder / "out"
    assert runs.run("task", whole, "--steps", "40") == 0
    process = runs.start("task", out, "--steps", "40", "--checkpoint-every", "3")
    while process.is_alive() and step_of(out) < 0:
        time.sleep(0.001)
    os.kill(process.pid or 0, number)
    assert runs.finish(process) == 130
    stopped = step_of(out)
    assert 3 <= stopped < 40
    said = runs.log.read_text()
    assert f"stopped at step {stopped} of 40" in said
    assert "--resume" in said
    assert len(said.strip().splitlines()) == 1, said
    assert not out.exists()
    # how often checkpoints are written does not belong to the result
    assert runs.run("task", out, "--steps", "40", "--resume") == 0
    assert same(whole, out)


def test_a_second_interrupt_stops_at_once_and_keeps_the_checkpoint_before(runs: Runs) -> None:
    out = runs.folder / "out"
    assert runs.run("task", out, "--steps", "8", "--json", call=2, deed="interrupt twice") == 130
    error = json.loads(runs.log.read_text())["error"]
    assert error["kind"] == "Interrupted"
    assert "--resume" in error["message"]
    assert step_of(out) == 2  # the write that was interrupted was that of step 4
    assert not out.exists()
    assert runs.run("task", out, "--steps", "8", "--resume") == 0
    assert runs.run("task", runs.folder / "whole", "--steps", "8") == 0
    assert same(runs.folder / "whole", out)


def test_a_run_with_overwrite_keeps_the_old_output_until_the_new_one_is_whole(runs: Runs) -> None:
    out = runs.folder / "out"
    assert runs.run("task", out, "--steps", "2") == 0
    old = (out / "adapter_model.safetensors").read_bytes()
    assert runs.run("task", out, "--steps", "6", "--overwrite", call=2) == -signal.SIGKILL
    assert (out / "adapter_model.safetensors").read_bytes() == old
    assert step_of(out) == 2
    assert runs.run("task", out, "--steps", "6", "--overwrite", "--resume") == 0
    assert runs.run("task", runs.folder / "whole", "--steps", "6") == 0
    assert same(runs.folder / "whole", out)


def test_a_run_whose_data_changed_is_not_resumed(runs: Runs) -> None:
    """Half of the adapter would come from data that its manifest does not name."""
    out = runs.folder / "out"
    assert runs.run("task", out, "--steps", "6", call=2) == -signal.SIGKILL
    data = runs.folder / "train.en.jsonl"
    content = data.read_text()
    data.write_text(content.replace("red", "ink"))
    assert runs.run("task", out, "--steps", "6", "--resume") == 1
    said = runs.log.read_text()
    assert "only with its own settings" in said
    assert "data was" in said
    data.write_text(content)
    assert runs.run("task", out, "--steps", "6", "--resume") == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[: len(good) // 2],
        lambda good: b"\xff" * 64,
        lambda good: (len(h := b'{"__metadata__":{"adaptermix":"{}"}}')).to_bytes(8, "little") + h,
        lambda good: (len(h := b'{"__metadata__":{"adaptermix":"[1]"}}')).to_bytes(8, "little") + h,
        lambda good: (2).to_bytes(8, "little") + b"{}",
    ],
    ids=["empty", "cut", "noise", "no settings", "no object", "no header"],
)
def test_a_damaged_checkpoint_is_refused_with_one_sentence_and_left_alone(
    runs: Runs, damage: Callable[[bytes], bytes]
) -> None:
    out = runs.folder / "out"
    assert runs.run("task", out, "--steps", "6", call=2) == -signal.SIGKILL
    path = partial_path(out) / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    assert runs.run("task", out, "--steps", "6", "--resume") == 1
    said = runs.log.read_text()
    assert said.startswith("error: ")
    assert "must be a checkpoint of adaptermix" in said
    assert path.read_bytes() == before
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--steps", "7"], "steps was 6, now 7"),
        (["--steps", "6", "--seed", "1"], "seed was 0, now 1"),
        (["--steps", "6", "--batch-size", "2"], "batch_size was 3, now 2"),
    ],
)
def test_other_settings_are_refused_by_name(runs: Runs, more: list[str], named: str) -> None:
    out = runs.folder / "out"
    assert runs.run("task", out, "--steps", "6", call=2) == -signal.SIGKILL
    assert runs.run("task", out, *more, "--resume") == 1
    assert named in runs.log.read_text()
    assert step_of(out) == 2
