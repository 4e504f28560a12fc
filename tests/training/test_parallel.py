"""Two processes do what one does; they stop, fail and go on together."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from adaptermix import AlignSettings, run_recipe, train_align
from adaptermix.cli import adaptermix
from adaptermix.errors import ModelError, PlanError, ReportedElsewhere
from adaptermix.models.base import load_base
from adaptermix.models.blocks import blocks
from adaptermix.tasks.data import read_pairs
from adaptermix.training.align import AlignLoss
from adaptermix.training.compiling import compiled
from adaptermix.training.parallel import ALONE, Processes

from ..refusals import refuses
from .crew import EVENTS, Crew
from .data import COLOURS, write_pairs
from .test_crashes import same, step_of


class Runs:
    """Commands on one tiny base model in one folder."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder, self.crew = folder, Crew(folder / "log")
        # answers of unlike length: a mean over tokens is not that of the processes' means
        rows = [{"text": f"go {c}", "slots": [{"type": "c", "value": c[: n + 1]}]} for n, c in enumerate(COLOURS)]
        for name in ("train.en.jsonl", "dev.en.jsonl"):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = ["--task", "slots", "--train", str(folder / "train.en.jsonl")]
        pairs = ["--pairs", *write_pairs(folder)]
        dev = ["--dev", str(folder / "dev.en.jsonl"), "--dev-pairs", str(folder / "fr-en.tsv"), "--evaluate-every", "2"]
        # so many sources are missing that now and then a process has none in its part of a batch
        sources = [{"text": "-" if n % 2 else f"en {c}", "slots": []} for n, c in enumerate(COLOURS)]
        (folder / "source.fr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sources))
        fusion = [*task, "--source", str(folder / "source.fr.jsonl"), "--fusion", "gated"]
        self._kinds = {"task": task, "align": pairs, "joint": [*task, *pairs, *dev], "fusion": fusion}
        self._common = [
            "--base",
            str(base),
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--batch-size",
            "5",
            "--rank",
            "2",
        ]
        self._common += ["--learning-rate", "0.01", "--checkpoint-every", "2"]

    def command(self, kind: str, out: str, *more: str) -> list[str]:
        return [f"train-{kind}", *self._kinds[kind], *self._common, "--out", str(self.folder / out), *more]

    def one(self, kind: str, out: str, *more: str, **environment: str) -> dict[str, torch.Tensor]:
        assert self.crew.run(self.command(kind, out, *more), count=1, **environment) == [0], self.said
        return self.weights(out)

    def two(self, kind: str, out: str, *more: str) -> dict[str, torch.Tensor]:
        assert self.crew.run(self.command(kind, out, *more)) == [0, 0], self.said
        return self.weights(out)

    def weights(self, out: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / out / "adapter_model.safetensors")

    @property
    def said(self) -> str:
        return self.crew.log.read_text()


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # what `main` sets comes too late for libraries that are warm
        for name in ("OMP_NUM_THREADS", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        yield


@pytest.fixture
def runs(causal: Path, tmp_path: Path) -> Runs:
    return Runs(causal, tmp_path)


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for key, tensor in one.items():
        assert float((tensor - other[key]).norm()) <= 1e-4 * float(tensor.norm()), key


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("task", ["--accumulate", "2"]),
        ("fusion", ["--batch-size", "4"]),
        ("align", ["--symmetric", "--mask-duplicates", "--keeper", "0.5"]),
        ("align", ["--objective", "both", "--dev-pairs", "de-en={folder}/fr-en.tsv", "--patience", "9"]),
        ("joint", ["--alternate", "sum", "--patience", "9", "--select", "sum"]),
    ],
)
def test_two_processes_give_the_adapter_of_one(runs: Runs, kind: str, more: list[str]) -> None:
    plain = ["--steps", "10", "--dropout", "0", *(option.format(folder=runs.folder) for option in more)]
    one, two = runs.one(kind, "one", *plain), runs.two(kind, "two", *plain, "--json")
    assert_near(one, two)
    said = runs.said
    assert len([line for line in said.splitlines() if line.startswith("{")]) == 1
    assert said.count("2 processes on CPU") == 1
    assert ("4 negatives per pair, of all processes" in said) == (kind in ("align", "joint"))
    logs = [(runs.folder / name / "history.jsonl").read_text().splitlines() for name in ("one", "two")]
    for ours, theirs in zip(*(map(json.loads, log) for log in logs), strict=True):
        for entry in (ours, theirs):
            entry.pop("seconds", None)
        parts, others = ours.pop("objectives", {}), theirs.pop("objectives", {})
        assert theirs == pytest.approx(ours, rel=1e-4)
        for name, part in parts.items():
            assert others[name] == pytest.approx(part, rel=1e-4)
    manifest = json.loads((runs.folder / "two" / "adaptermix.json").read_text())
    assert manifest["engine"] == {"processes": 2}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("task", ["--gradient-checkpointing", "--norm-budget", "0.01"]),
        ("align", ["--layer", "1", "--keeper", "0.5"]),
        ("align", ["--layer", "1", "--objective", "distil", "--gradient-checkpointing"]),
        ("joint", ["--patience", "9"]),
    ],
)
def test_a_base_in_shares_gives_the_same_adapter(runs: Runs, kind: str, more: list[str]) -> None:
    """Five rows on two processes: they have unlike shares, and must run the model equally often all the same."""
    plain = ["--steps", "4", "--dropout", "0", *more]
    whole, shared = runs.two(kind, "whole", *plain), runs.two(kind, "shared", *plain, "--shard-base")
    assert "2 processes on CPU, the base model in shares" in runs.said
    assert_near(whole, shared)
    manifest = json.loads((runs.folder / "shared" / "adaptermix.json").read_text())
    assert manifest["engine"] == {"processes": 2, "sharded": True}
    on_top = [*plain, "--on-top-of", str(runs.folder / "whole")]
    assert_near(runs.two(kind, "a", *on_top), runs.two(kind, "b", *on_top, "--shard-base"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_part_of_the_base_is_taken_out_alike_in_every_process(runs: Runs, init: str) -> None:
    for kind in ("task", "align"):
        plain = ["--steps", "6", "--dropout", "0", "--init", init]
        assert_near(runs.one(kind, f"{kind}-one", *plain), runs.two(kind, f"{kind}-two", *plain))


def test_a_base_in_shares_is_half_the_size_and_needs_another_process(runs: Runs, causal: Path) -> None:
    assert runs.crew.run(runs.command("task", "sizes", "--steps", "1", "--shard-base"), deeds={0: "size"}) == [0, 0]
    blocks_of = blocks(load_base(str(causal), dtype="float32", device="cpu").model)[1]
    assert f"of the blocks here: {sum(p.numel() for p in blocks_of.parameters()) // 2}" in runs.said
    assert runs.crew.run(runs.command("task", "alone", "--steps", "1", "--shard-base"), count=1) == [1]
    assert "--shard-base needs several processes, as torchrun or accelerate launch start them (1 here)" in runs.said


def test_a_crew_that_is_killed_and_stopped_ends_with_the_same_bytes(runs: Runs) -> None:
    """One is killed, then both, then one is asked to stop; each time they go on."""
    runs.two("task", "whole", "--steps", "24", "--dropout", "0.2")
    out = runs.folder / "out"
    command = runs.command("task", "out", "--steps", "24", "--dropout", "0.2", "--resume")

    def start_and_wait() -> list[ForkServerProcess]:
        before = step_of(out)
        processes = runs.crew.start(command)
        limit = time.monotonic() + 600
        while step_of(out) == before and time.monotonic() < limit:
            time.sleep(0.001)
        return processes

    for victim in (1, 0):
        processes = start_and_wait()
        processes[victim].kill()
        codes = runs.crew.end(processes)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 1
        assert runs.said.count("error: ") == 1, runs.said
        assert "has ended early. Start all of them again with --resume" in runs.said
    processes = start_and_wait()
    for process in processes:
        process.kill()
    runs.crew.end(processes)
    processes = start_and_wait()
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    assert runs.crew.end(processes) == [130, 130], runs.said
    assert runs.said.count(f"stopped at step {step_of(out)} of 24") == 1
    assert not out.exists()
    assert runs.crew.run(command) == [0, 0], runs.said
    assert same(runs.folder / "whole", out)


def test_what_one_process_cannot_do_is_said_once_and_ends_all(runs: Runs) -> None:
    command = runs.command("task", "out", "--steps", "9", "--dropout", "0")
    assert runs.crew.run(command, deeds={1: "fail at 3"}) == [1, 1]
    assert runs.said.splitlines()[1:] == ["error: the rows of this process must be read, and one is broken."]
    assert step_of(runs.folder / "out") == 2
    # what all of them find is said once too, before a model is loaded, and after
    assert runs.crew.run(command) == [1, 1]
    assert runs.said.count("error: an interrupted run") == 1
    assert len(runs.said.splitlines()) == 2
    assert runs.crew.run([*command, "--overwrite", "--batch-size", "1"]) == [1, 1]
    assert runs.said == "error: --batch-size must be at least 2, a row for each of 2 processes, got 1.\n"
    assert runs.crew.run(["train-task"]) == [2, 2]
    assert runs.said.count("Usage: ") == 1


@pytest.mark.parametrize("event", EVENTS)
def test_a_stop_in_one_process_holds_for_all(runs: Runs, event: str) -> None:
    """A process that went on alone would wait for the other for ever."""
    command = runs.command("task", "out", "--steps", "5", "--dropout", "0", "--json")
    assert runs.crew.run(command, deeds={1: event}) == [0, 0], runs.said
    steps = {"on_step_begin": 1, "on_step_end": 1, "on_save": 2}
    assert event == "on_train_begin" or f'"steps": {steps[event]}' in runs.said


class Pretended(Processes):
    """One of several processes, with what the others say given."""

    def __init__(self, rank: int, count: int, total: float) -> None:
        super().__init__()
        self.rank, self.count, self._total = rank, count, total

    def total(self, *numbers: float) -> list[float]:
        return [self._total for _ in numbers]


@pytest.mark.parametrize("size", [5, 4, 2, 1])
def test_without_gathering_a_pair_is_contrasted_within_its_share(causal: Path, tmp_path: Path, size: int) -> None:
    """The whole is the mean over pairs; a single pair, too few to share, is done by both."""
    pairs = read_pairs(write_pairs(tmp_path))[0]
    settings = AlignSettings(base=str(causal), pairs=["x"], out="x", gather_negatives=False)
    base = load_base(str(causal), dtype="float32", device="cpu")
    loss = AlignLoss(base, pairs, settings)
    rows = list(range(size))
    parts = [loss._part(rows, Pretended(rank, 2, max(size, 2))).loss for rank in (0, 1)]
    shares = [rows[::2], rows[1::2]] if size > 1 else [rows, rows]
    expected = sum(len(share) * float(loss._of_rows(share).loss) for share in shares) / max(size, 2)
    assert sum(map(float, parts)) == pytest.approx(expected, rel=1e-6)


def test_shares_hold_every_row_once_and_draws_differ() -> None:
    for size in range(3, 9):
        shares = Pretended(0, 3, 0).shares(range(size))
        assert sorted(row for share in shares for row in share) == list(range(size))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    seeds = {Pretended(rank, 3, 0).seed(7, number) for rank in range(3) for number in range(50)}
    assert len(seeds) == 150
    assert Pretended(0, 3, 0).seed(7, 4) == ALONE.seed(7, 4) == (7 << 32) + 4


@pytest.mark.parametrize(
    ("environment", "more", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "the launcher must not wrap the model, but it requests FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "requests DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "mixed precision must be no or bf16, .* asks for fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "--compile"),
        ({}, {"shard_base": True, "quantize": "nf4"}, "--shard-base needs .* neither quantised nor"),
        ({}, {"shard_base": True, "dora": True}, "DoRA needs it whole"),
        ({}, {"device": "cuda:1"}, "--device must be auto, cpu or cuda where 4 processes take a GPU each"),
        ({}, {"batch_size": 3}, "--batch-size must be at least 4, a row for each of 4 processes, got 3"),
        ({}, {"batch_size": 7, "gather_negatives": False}, "at least 8, a pair and its negative for each of 4"),
    ],
)
def test_what_a_launcher_may_not_ask_for_is_refused_before_anything(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], more: dict[str, object], message: str
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "ACCELERATE_MIXED_PRECISION": "no"}
    for name, value in (place | environment).items():
        monkeypatch.setenv(name, value)
    settings = AlignSettings(base="none", pairs=["none"], out="none", **more)
    with pytest.raises(PlanError, match=message):
        train_align(settings)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ReportedElsewhere, match=message):
        train_align(settings)


def test_commands_that_do_not_train_want_no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nsteps:\n  - inspect: {adapters: [x]}\n")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    found = CliRunner().invoke(adaptermix, ["inspect", "x"])
    assert found.exit_code == 2
    assert "start 'inspect' without a launcher" in found.output
    with refuses("recipe.processes: inspect"):
        run_recipe(recipe)


def test_mixed_precision_is_that_of_the_launcher_and_near_float32(runs: Runs) -> None:
    plain = ["--steps", "3", "--dropout", "0"]
    for kind in ("task", "align"):
        whole = runs.one(kind, f"{kind}-float32", *plain)
        mixed = runs.one(kind, f"{kind}-bf16", *plain, ACCELERATE_MIXED_PRECISION="bf16")
        assert "mixed precision bf16" in runs.said
        apart = max(float((whole[key] - mixed[key]).norm() / whole[key].norm()) for key in whole)
        assert 1e-4 < apart < 0.5
        manifest = json.loads((runs.folder / f"{kind}-bf16" / "adaptermix.json").read_text())
        assert manifest["engine"] == {"mixed_precision": "bf16"}
        losses = [
            json.loads((runs.folder / f"{kind}-{name}" / "history.jsonl").read_text().splitlines()[0])["loss"]
            for name in ("float32", "bf16")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_compiled_blocks_give_the_same_adapter(runs: Runs) -> None:
    plain = ["--steps", "2", "--dropout", "0", "--layer", "2"]
    whole = runs.one("align", "eager", *plain)
    command = runs.command("align", "compiled", *plain, "--compile")
    assert runs.crew.run(command, count=1, deeds={0: "eager"}) == [0], runs.said
    assert_near(whole, runs.weights("compiled"))


def test_a_compiler_that_fails_is_a_sentence(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler here")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend=fail))
    base = load_base(str(causal), dtype="float32", device="cpu")
    message = r"--compile needs .* and fails: no compiler here\. Train without --compile\."
    with pytest.raises(ModelError, match=message), compiled(base.model, enabled=True):
        base.model(torch.tensor([[1, 2, 3]]))
    assert all("forward" not in vars(block) for block in blocks(base.model)[1])
