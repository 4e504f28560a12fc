"""Searches that share a place, begin again, or are asked for something that helps nobody."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adaptermix import SearchSettings, search
from adaptermix.io.files import locked_output
from adaptermix.tuning import tune
from adaptermix.weight_search import search_dry
from adaptermix.weight_search.space import Candidate, CandidateList
from adaptermix.weight_search.trial_store import TrialStore, check_idle
from tests.factories import peft_lora
from tests.training.data import Notes, write_slots

from ..refusals import refuses

COMMON = {"task": "classify", "max_new_tokens": 6, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def given(causal: Path, tmp_path: Path) -> dict[str, Any]:
    adapters = [
        peft_lora(causal, tmp_path / f"a{seed}", seed=seed, r=rank, lora_alpha=24 * rank)
        for seed, rank in enumerate((4, 2))
    ]
    rows = [{"text": f"wake me {n}", "label": "xy"[n % 2]} for n in range(12)]
    (tmp_path / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **COMMON,
        "base": str(causal),
        "adapters": list(map(str, adapters)),
        "dev": [str(tmp_path / "en.jsonl")],
        "out": str(tmp_path / "out"),
    }


def test_rows_count_once(given: dict[str, Any], tmp_path: Path) -> None:
    copied = tmp_path / "copy.en.jsonl"
    copied.write_bytes(Path(given["dev"][0]).read_bytes())
    with refuses("search.file-twice: dev"):
        search_dry(SearchSettings(**given | {"dev": [*given["dev"], str(copied)], "grid": [0.5]}))


def test_the_task_adapter_alone_is_not_asked_again_as_a_candidate(given: dict[str, Any]) -> None:
    found = search(SearchSettings(**given, grid=[0.5, 1.0]))
    assert found.trials[1].answers == found.baseline.answers
    assert found.trials[1].seconds == 0.0


def test_sums_of_a_grid_keep_the_whole_first_adapter(given: dict[str, Any]) -> None:
    assert search_dry(SearchSettings(**given, grid=[0.25, 1.0], space="sum"))["candidates"] == ["1/0.25", "1/1"]
    with refuses("search.space: sum"):
        SearchSettings(**given, trials=3, space="sum")


def test_an_alignment_adapter_in_the_first_place_is_told(given: dict[str, Any]) -> None:
    for path, role in zip(given["adapters"], ("aligned", "supervised"), strict=True):
        (Path(path) / "adaptermix.json").write_text(json.dumps({"languages": {role: ["en"]}}))
    document = search_dry(SearchSettings(**given, grid=[0.5]))
    assert any("is an alignment adapter: list 'a1' first" in note for note in document["notes"])
    assert document["candidates"] == ["0.5/0.5"]
    given["adapters"] = given["adapters"][::-1]
    assert not search_dry(SearchSettings(**given, grid=[0.5]))["notes"]


def test_a_search_that_goes_on_says_so_and_knows_the_best(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptermix.weight_search import run

    settings = SearchSettings(**given, grid=[0.3, 0.6, 0.9])
    monkeypatch.setattr(run, "TOGETHER", 1)
    real, asked = run._TrialRunner._answer, []

    def answer(work: Any, trials: Any) -> Any:
        asked.append(trials)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(work, trials)

    with monkeypatch.context() as patched:
        patched.setattr(run._TrialRunner, "_answer", answer)
        with pytest.raises(KeyboardInterrupt):
            search(settings)
    notes = Notes()
    search(settings, watch=notes)
    assert "resuming after 2 finished trials" in notes.said


def test_one_process_at_a_time_works_on_an_output(given: dict[str, Any], tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from adaptermix.io.files import locked_output\n"
        "with locked_output(Path(sys.argv[1]), Path(sys.argv[2])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".out.partial"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with refuses("output.busy"):
            search(SearchSettings(**given, grid=[0.5]))
    finally:
        other.kill()
        other.communicate()
    assert search(SearchSettings(**given, grid=[0.5])).out.exists()
    with locked_output(tmp_path / "new", tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_study_that_others_work_on_is_not_begun_again(tmp_path: Path) -> None:
    place = tmp_path / "log"
    store = TrialStore((place, "s"), searched=CandidateList([Candidate(weights=(1.0,))]), settings={}, limit=1)
    asked = store.ask()
    assert asked is not None
    check_idle((place, "s"))  # this process's own
    store._open[asked.number].set_user_attr("worker", [socket.gethostname(), os.getppid(), "another"])
    with refuses("study.busy"):
        check_idle((place, "s"))


@pytest.mark.parametrize("is_late", [False, True])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, is_late: bool) -> None:
    """Also one that begins to look only after its parent is gone, as on a busy machine."""
    begin = tmp_path / "begin"
    child = (
        "import os, sys, threading, time; from pathlib import Path\n"
        "from adaptermix.weight_search.worker import end_with\n"
        "print('up', flush=True)\n"
        "while not Path(sys.argv[2]).exists(): time.sleep(0.01)\n"
        "threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()\n"
        "print('watching', flush=True)\n"
        "time.sleep(300); print('survived', flush=True)"
    )
    parent_code = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid()), sys.argv[2]])\n"
        "time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code, child, str(begin)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    if not is_late:
        begin.touch()
        assert parent.stdout.readline() == "watching\n"
    parent.kill()
    parent.wait()
    begin.touch()
    # the child holds the other end of the pipe, which closes when it ends
    assert "survived" not in parent.stdout.read()
    parent.stdout.close()


RECIPE = """
version: 1
variables: {out: unset, note: one}
steps:
  - train-task: {base: b, task: slots, train: [train.en.jsonl], out: "${out}/task", steps: 3}
  - evaluate: {base: b, adapter: "${out}/task", task: slots, data: [train.en.jsonl]}
"""


def test_recipes_are_searched_in_a_place_and_a_text_of_their_own(tmp_path: Path) -> None:
    write_slots(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("train.en.jsonl", str(tmp_path / "train.en.jsonl")))

    def run(step: Any) -> dict[str, Any]:
        if step.command == "train-task":
            Path(step.settings.out).mkdir(parents=True)
        return {"overall": {"value": 0.5, "low": 0.4, "high": 0.6}}

    def again(out: str = "out", **more: Any) -> Any:
        return tune(recipe, {"train-task.seed": [1, 2]}, out=tmp_path / out, run=run, **more)

    assert len(again().candidates) == 2
    recipe.write_text(recipe.read_text() + "# a comment changes nothing\n")
    again()
    for change in ({"overrides": {"note": "two"}}, {}):
        notes = Notes()
        again(watch=notes, **change)
        assert any("the recipe, or values of its variables, changed" in note for note in notes.said)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "adapter_config.json").write_text("{}")
    with refuses("tune.out-not-empty"):
        again("full")
    with refuses("output.is-file"):
        again("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("out: unset, ", "").replace("${out}", "x"))
    with refuses("tune.no-out-variable"):
        again("new")
