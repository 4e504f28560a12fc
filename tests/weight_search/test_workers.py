"""Several processes on one search."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from adaptermix import (
    AlignSettings,
    EvaluateSettings,
    SearchSettings,
    TaskSettings,
    evaluate,
    merge,
    search,
    train_align,
    train_task,
)
from adaptermix.progress import Silent, Watcher
from adaptermix.weight_search import workers
from adaptermix.weight_search.storage import open_study
from tests.factories import contents, peft_lora
from tests.refusals import refuses

PLANTED = 0.4
GRID = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.fixture
def settings(causal: Path, tmp_path: Path) -> SearchSettings:
    one = peft_lora(causal, tmp_path / "one", seed=1, r=4, lora_alpha=64)
    two = peft_lora(causal, tmp_path / "two", seed=2, r=2, lora_alpha=32)
    common = {"base": str(causal), "task": "classify", "max_new_tokens": 12, "dtype": "float32", "device": "cpu"}
    # right is what the merge with PLANTED answers
    write(tmp_path / "asked.en.jsonl", [{"text": f"wake me {n}", "label": "x"} for n in range(40)])
    merge([one, two], weights=[PLANTED], out=tmp_path / "planted")
    found = evaluate(
        EvaluateSettings(adapter=str(tmp_path / "planted"), data=[str(tmp_path / "asked.en.jsonl")], **common)
    )
    rows = [{"text": f"wake me {n}", "label": answer} for n, answer in enumerate(found.answers) if answer]
    assert len(rows) > 20
    write(tmp_path / "en.jsonl", rows)
    return SearchSettings(
        adapters=[str(one), str(two)],
        dev=[str(tmp_path / "en.jsonl")],
        grid=GRID,
        out=str(tmp_path / "out"),
        **common,
    )


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_two_of_four_workers_are_killed_and_no_trial_is_lost_or_counted_twice(
    settings: SearchSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serial = search(settings.model_copy(update={"out": str(tmp_path / "serial")}))
    killed: list[int] = []
    done = threading.Event()
    journal = tmp_path / ".out.partial" / "trials.log"
    real = workers.start_workers

    def kill_busy(processes: list[subprocess.Popen[bytes]]) -> None:
        """Kill two workers, each when it has its first trial."""
        while len(killed) < 2 and any(process.poll() is None for process in processes):
            text = journal.read_text().replace(" ", "") if journal.exists() else ""
            for process in processes:
                if f",{process.pid}," in text and process.pid not in killed and len(killed) < 2:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
            time.sleep(0.005)
        done.set()

    @contextmanager
    def watched(asked: SearchSettings, watch: Watcher) -> Iterator[None]:
        with real(asked, watch) as processes:
            threading.Thread(target=kill_busy, args=(processes,), daemon=True).start()
            yield

    monkeypatch.setattr("adaptermix.weight_search.run.start_workers", watched)
    from adaptermix.weight_search import run

    # this process waits with its first trials until two others have had some and are gone
    fast = run._TrialRunner._answer
    monkeypatch.setattr(run._TrialRunner, "_answer", lambda *given: done.wait() and fast(*given))
    parallel = search(settings.model_copy(update={"workers": 4}))
    assert len(killed) == 2
    weights = sorted(trial.candidate.weights[0] for trial in parallel.trials)
    assert weights == GRID
    assert parallel.chosen.candidate == serial.chosen.candidate
    assert parallel.chosen.candidate.weights[0] == PLANTED
    assert parallel.verdict.difference == serial.verdict.difference
    assert parallel.verdict.chance == serial.verdict.chance
    answers = {trial.candidate.weights: trial.answers for trial in serial.trials}
    assert all(trial.answers == answers[trial.candidate.weights] for trial in parallel.trials)
    weights_file = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights_file).read_bytes() == (tmp_path / "serial" / weights_file).read_bytes()


def test_a_search_that_was_killed_goes_on_and_ends_as_an_unbroken_one(settings: SearchSettings, tmp_path: Path) -> None:
    whole = settings.model_copy(update={"out": str(tmp_path / "whole")})
    search(whole)
    script = (
        "import sys, os, signal\n"
        "from adaptermix import SearchSettings, search\n"
        "from adaptermix.weight_search import run\n"
        "run.TOGETHER = 100  # some trials share passes\n"
        "count = [0]; real = run._TrialRunner._answer\n"
        "def answer(*given):\n"
        "    count[0] += 1\n"
        "    if count[0] == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*given)\n"
        "run._TrialRunner._answer = answer\n"
        "search(SearchSettings.model_validate_json(sys.stdin.read()))\n"
    )
    text = settings.model_dump_json().encode()
    assert subprocess.run([sys.executable, "-c", script], input=text, check=False).returncode == -9
    asked = []
    from adaptermix.weight_search import run

    real = run._TrialRunner._answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._TrialRunner, "_answer", lambda work, trials: asked.extend(trials) or real(work, trials))
        search(settings)
    rows = len(Path(settings.dev[0]).read_text().splitlines())
    assert 1 < -(-100 // rows) < 5
    assert len(asked) == len(GRID) - 2 * -(-100 // rows)
    first, second = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert first["adapter_model.safetensors"] == second["adapter_model.safetensors"]
    assert not (tmp_path / ".out.partial").exists()


def test_a_database_is_shared_and_stays(settings: SearchSettings, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'trials.db'}"
    few = settings.model_copy(update={"grid": [0.5, 0.9], "storage": storage, "study": "mine"})
    first = search(few)
    again = search(few.model_copy(update={"out": str(tmp_path / "again")}))
    assert [trial.answers for trial in first.trials] == [trial.answers for trial in again.trials]
    assert (tmp_path / "trials.db").exists()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], url: str) -> Iterator[str]:
    """Run a server in another process, and yield its URL."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield url
    finally:
        server.kill()
        server.wait()


def grpc_storage(folder: Path) -> AbstractContextManager[str]:
    """Serve a database by optuna's proxy."""
    port = free_port()
    program = (
        "from optuna.storages import RDBStorage, run_grpc_proxy_server;"
        f"run_grpc_proxy_server(RDBStorage('sqlite:///{folder}/trials.db'), host='127.0.0.1', port={port})"
    )
    return running([sys.executable, "-c", program], f"grpc://127.0.0.1:{port}")


@contextmanager
def redis_storage(folder: Path) -> Iterator[str]:
    """Serve Redis."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with running(command, f"redis://127.0.0.1:{port}/0") as url:
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield url


def test_a_proxy_of_a_storage_is_shared(settings: SearchSettings, tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    with grpc_storage(tmp_path) as url:
        few = settings.model_copy(update={"grid": [0.5, 0.9], "storage": url, "study": "mine"})
        first = search(few)
        again = search(few.model_copy(update={"out": str(tmp_path / "again")}))
    assert [trial.answers for trial in first.trials] == [trial.answers for trial in again.trials]


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")
def test_a_journal_in_redis_is_shared(settings: SearchSettings, tmp_path: Path) -> None:
    pytest.importorskip("redis")
    with redis_storage(tmp_path) as url:
        few = settings.model_copy(update={"grid": [0.5, 0.9], "storage": url, "study": "mine"})
        first = search(few)
        again = search(few.model_copy(update={"out": str(tmp_path / "again")}))
    assert [trial.answers for trial in first.trials] == [trial.answers for trial in again.trials]


@pytest.mark.parametrize("url", ["grpc://localhost", "grpc://localhost:1/x"])
def test_a_proxy_needs_host_and_port(url: str, settings: SearchSettings) -> None:
    with refuses("storage.unreachable: grpc://HOST:PORT"):
        search(settings.model_copy(update={"storage": url, "study": "mine"}))


@pytest.mark.parametrize(("url", "packages"), [("grpc://h:1", "grpcio protobuf"), ("redis://:secret@h/0", "redis")])
def test_a_storage_names_the_packages_that_it_needs(
    url: str, packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptermix.weight_search.storage.find_spec", lambda _: None)
    with refuses(f"storage.unreachable: pip install {packages}") as caught:
        open_study((url, "mine"))
    assert "secret" not in str(caught.value)


def test_workers_take_heads_and_replace_outputs(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in (("good day", "a"), ("bad day", "b"))] * 10
    write(tmp_path / "en.jsonl", rows)
    common = {"base": str(encoder), "dtype": "float32", "device": "cpu"}
    data = [str(tmp_path / "en.jsonl")]
    train_task(TaskSettings(task="classify", train=data, out=str(tmp_path / "task"), steps=3, batch_size=4, **common))
    (tmp_path / "de-en.tsv").write_text("".join(f"satz {n}\tsentence {n}\n" for n in range(8)))
    pairs = [str(tmp_path / "de-en.tsv")]
    train_align(AlignSettings(pairs=pairs, out=str(tmp_path / "align"), steps=2, batch_size=4, **common))
    asked = SearchSettings(
        adapters=[str(tmp_path / "task"), str(tmp_path / "align")],
        task="classify",
        dev=data,
        grid=[0.0, 0.5, 0.9],
        out=str(tmp_path / "out"),
        **common,
    )
    alone = search(asked)
    said: list[str] = []
    watch = type("Notes", (Silent,), {"note": lambda _self, text: said.append(text)})()
    together = search(asked.model_copy(update={"workers": 2, "overwrite": True}), watch=watch)
    assert not [text for text in said if "warning: worker" in text]
    answers = {trial.candidate.weights: trial.answers for trial in alone.trials}
    assert {trial.candidate.weights: trial.answers for trial in together.trials} == answers
    # a weight of 0 leaves the head, as in the trial
    lone = search(asked.model_copy(update={"grid": [0.0], "out": str(tmp_path / "zero")}))
    found = evaluate(EvaluateSettings(adapter=str(tmp_path / "zero"), task="classify", data=data, **common))
    assert list(found.answers) == list(lone.trials[0].answers)


def test_an_interrupted_search_that_replaces_an_output_goes_on(settings: SearchSettings, tmp_path: Path) -> None:
    few = settings.model_copy(update={"grid": [0.4, 0.9]})
    search(few)
    from adaptermix.weight_search import run

    real, asked = run._TrialRunner._answer, []

    def answer(work: Any, trials: Any) -> Any:
        asked.extend(trial.candidate.weights[0] for trial, _ in trials)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(work, trials)

    again = few.model_copy(update={"overwrite": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._TrialRunner, "_answer", answer)
        patch.setattr(run, "TOGETHER", 1)
        with pytest.raises(KeyboardInterrupt):
            search(again)
        assert (tmp_path / "out" / "adapter_config.json").exists()
        search(again)
    assert asked == [0.4, 0.9, 0.9]
    other = again.model_copy(update={"grid": [0.4, 0.5]})
    assert len(search(other).trials) == 2


def test_no_password_reaches_the_manifest(settings: SearchSettings, tmp_path: Path) -> None:
    few = settings.model_copy(update={"grid": [0.4], "storage": f"sqlite:///{tmp_path / 'secret.db'}"})
    search(few)
    assert "secret" not in (tmp_path / "out" / "adaptermix.json").read_text()


def test_four_processes_of_the_command_line_share_one_journal(settings: SearchSettings, tmp_path: Path) -> None:
    """One command in four processes, each with an output of its own, as a job array runs it (docs/server.md)."""
    asked = 8
    command = [
        *(sys.executable, "-m", "adaptermix", "search", *settings.adapters),
        *("--base", settings.base, "--task", settings.task, "--dev", *settings.dev),
        *("--max-new-tokens", "12", "--dtype", "float32", "--device", "cpu"),
        *("--trials", str(asked), "--sampler", "random", "--control", "0", "--json"),
        *("--storage", str(tmp_path / "shared.log"), "--study", "best"),
    ]
    outs = [tmp_path / f"best-{number}" for number in range(4)]
    processes = [
        subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for out in outs
    ]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], ended
    documents = [json.loads(stdout) for stdout, _ in ended]
    tables = [sorted((trial["weights"], trial["value"]) for trial in document["trials"]) for document in documents]
    assert tables == [tables[0]] * 4
    assert len({tuple(weights) for weights, _ in tables[0]}) == len(tables[0]) == asked
    assert [document["best"] for document in documents] == [documents[0]["best"]] * 4
    assert len({(out / "adapter_model.safetensors").read_bytes() for out in outs}) == 1
