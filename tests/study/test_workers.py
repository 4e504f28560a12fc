"""Several processes on one search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adaptermix import EvaluateSettings, SearchSettings, evaluate, merge, search
from adaptermix.study import workers
from tests.factories import contents, peft_lora

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
    killed = []
    journal = tmp_path / ".out.partial" / "trials.log"
    real = workers.helped

    def kill_busy(processes: list[subprocess.Popen[bytes]], own: int) -> None:
        """Kill two workers, each while it has a trial."""
        end = time.monotonic() + 120
        while len(killed) < 2 and time.monotonic() < end:
            text = journal.read_text() if journal.exists() else ""
            for process in processes:
                mine = f",{process.pid}," in text.replace(" ", "")
                if mine and process.pid not in killed and len(killed) < 2:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
            time.sleep(0.005)

    def watched(asked: SearchSettings, watch: object) -> object:
        context = real(asked, watch)  # type: ignore[arg-type]

        class Watched:
            def __enter__(self) -> None:
                processes = context.__enter__()
                threading.Thread(target=kill_busy, args=(processes, os.getpid()), daemon=True).start()

            def __exit__(self, *error: object) -> None:
                context.__exit__(*error)  # type: ignore[arg-type]

        return Watched()

    monkeypatch.setattr("adaptermix.study.run.helped", watched)
    # slow enough here that the others get trials too
    from adaptermix.study import run

    fast = run._Work._answer
    monkeypatch.setattr(run._Work, "_answer", lambda *given: time.sleep(4) or fast(*given))
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
        "from adaptermix.study import run\n"
        "count = [0]; real = run._Work._answer\n"
        "def answer(*given):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*given)\n"
        "run._Work._answer = answer\n"
        "search(SearchSettings.model_validate_json(sys.stdin.read()))\n"
    )
    text = settings.model_dump_json().encode()
    assert subprocess.run([sys.executable, "-c", script], input=text, check=False).returncode == -9
    asked = []
    from adaptermix.study import run

    real = run._Work._answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._Work, "_answer", lambda *given: asked.append(given[1].candidate.weights[0]) or real(*given))
        search(settings)
    assert len(asked) == len(GRID) - 3
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
