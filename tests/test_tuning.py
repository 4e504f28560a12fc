"""Settings of a recipe as parameters of a search."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adaptermix.cli import main
from adaptermix.commands.recipe_file import Step
from adaptermix.errors import ModelError
from adaptermix.progress import run_name
from adaptermix.tuning import candidates, plan, tune
from tests.factories import contents
from tests.training.data import write_pairs, write_slots

from .refusals import refuses

RECIPE = """
version: 1
variables: {out: unset, base: none, data: none, steps: 3}
steps:
  - train-task: {base: "${base}", task: slots, train: ["${data}/train.en.jsonl"], out: "${out}/task", steps: "${steps}"}
  - train-align: {base: "${base}", pairs: ["${data}/*-en.tsv"], out: "${out}/align", steps: "${steps}"}
  - search: {adapters: ["${out}/task", "${out}/align"], base: "${base}", task: slots, dev: ["${data}/train.en.jsonl"],
             grid: [0.5, 0.9], max_new_tokens: 2, out: "${out}/merged"}
"""
VARY = {"train-align.temperature": [0.1, 0.5, 0.2], "train-align.layer": [1, 2]}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    write_pairs(tmp_path)
    write_slots(tmp_path)
    return path


class Pretended:
    """Steps that leave their settings behind; the search prefers temperature 0.2 and layer 2."""

    def __init__(self, fails_at: int = 0) -> None:
        self.ran: list[str] = []
        self._fails_at = fails_at

    def __call__(self, step: Step) -> dict[str, Any]:
        if len(self.ran) + 1 == self._fails_at:
            raise ModelError("as asked")
        self.ran.append(step.command)
        out = Path(step.settings.out)  # type: ignore[attr-defined]
        out.mkdir(parents=True)
        (out / "settings.json").write_text(step.settings.model_dump_json())
        if step.command != "search":
            return {"out": str(out)}
        align = json.loads((Path(step.settings.adapters[1]) / "settings.json").read_text())  # type: ignore[attr-defined]
        value = 1 - abs(align["temperature"] - 0.2) + (align["layer"] == 2) / 5
        return {"best": {"weights": [0.9, 0.1], "value": value, "low": value - 0.1, "high": value + 0.1}}


def test_a_folder_of_another_search_is_refused(recipe: Path, tmp_path: Path) -> None:
    tune(recipe, VARY, out=tmp_path / "out", run=Pretended())
    before = (tmp_path / "out" / "results.json").read_bytes()
    with refuses("tune.other-search"):
        tune(recipe, {"train-align.temperature": [0.1, 0.5]}, out=tmp_path / "out", run=Pretended())
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_trackers_show_the_runs_of_candidates_under_different_names(recipe: Path, tmp_path: Path) -> None:
    names = []
    pretended = Pretended()

    def run(step: Step) -> dict[str, Any]:
        if step.command == "train-align":
            names.append(run_name(Path(step.settings.out)))  # type: ignore[attr-defined]
        return pretended(step)

    tune(recipe, {"train-align.layer": [1, 2]}, out=tmp_path / "sweep", run=run)
    assert names == ["sweep-1-align", "sweep-2-align"]
    assert run_name(tmp_path / "align") == "align"


def test_all_combinations_run_and_shared_steps_run_once(recipe: Path, tmp_path: Path) -> None:
    run = Pretended()
    found = tune(recipe, VARY, out=tmp_path / "out", overrides={"data": str(tmp_path)}, run=run)
    assert found.best.settings == {"train-align.temperature": 0.2, "train-align.layer": 2}
    assert [candidate.ran for candidate in found.candidates] == [3, 2, 2, 2, 2, 2]
    assert run.ran.count("train-task") == 1
    for candidate in found.candidates:
        seen = json.loads((candidate.folder / "align" / "settings.json").read_text())
        assert seen["temperature"] == candidate.settings["train-align.temperature"]
        assert (candidate.folder / "task" / "settings.json").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found.document()


@pytest.mark.parametrize("fails_at", range(1, 14))
def test_it_goes_on_where_it_stopped(fails_at: int, recipe: Path, tmp_path: Path) -> None:
    first, second = Pretended(fails_at), Pretended()
    settings: dict[str, Any] = {"out": tmp_path / "out", "overrides": {"data": str(tmp_path)}}
    with pytest.raises(ModelError):
        tune(recipe, VARY, run=first, **settings)
    found = tune(recipe, VARY, run=second, **settings)
    assert len(first.ran) + len(second.ran) == 13
    assert found.best.value == pytest.approx(1.2)
    third = Pretended()
    assert tune(recipe, VARY, run=third, **settings).best.settings == found.best.settings
    assert third.ran == []


def test_what_changed_runs_again_and_the_rest_does_not(recipe: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"vary": {"train-align.temperature": [0.1, 0.2]}, "out": tmp_path / "out"}
    shared = {"data": str(tmp_path)}
    tune(recipe, run=Pretended(), overrides=shared, **settings)
    again = Pretended()
    tune(recipe, run=again, overrides=shared | {"train-align.rank": 4}, **settings)
    assert again.ran == ["train-align", "search"] * 2
    seen = json.loads((tmp_path / "out" / "trials" / "2" / "align" / "settings.json").read_text())
    assert (seen["rank"], seen["temperature"]) == (4, 0.2)
    (tmp_path / "de-en.tsv").write_text("eins\tone\nzwei\ttwo\ndrei\tthree\n")
    third = Pretended()
    tune(recipe, run=third, overrides=shared | {"train-align.rank": 4}, **settings)
    assert third.ran == ["train-align", "search"] * 2


def test_a_base_model_that_was_replaced_in_its_place_is_trained_on_anew(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("weights")
    shared: dict[str, Any] = {"data": str(tmp_path), "base": str(tmp_path / "base")}
    settings: dict[str, Any] = {"vary": {"train-align.layer": [1]}, "out": tmp_path / "out", "overrides": shared}
    for ran in (["train-task", "train-align", "search"], []):
        run = Pretended()
        tune(recipe, run=run, **settings)
        assert run.ran == ran
    (tmp_path / "base" / "model.safetensors").write_text("others")
    last = Pretended()
    tune(recipe, run=last, **settings)
    assert last.ran == ["train-task", "train-align", "search"]


def test_an_output_without_a_note_is_made_anew(recipe: Path, tmp_path: Path) -> None:
    """The run ended after a step's output and before the record was written."""
    settings: dict[str, Any] = {"out": tmp_path / "out", "overrides": {"data": str(tmp_path)}}
    (tmp_path / "out" / "trials" / "1" / "task").mkdir(parents=True)
    run = Pretended()
    assert tune(recipe, VARY, run=run, **settings).best.value == pytest.approx(1.2)
    assert run.ran.count("train-task") == 1


def test_what_cannot_be_searched_is_refused_before_anything_runs(recipe: Path, tmp_path: Path) -> None:
    with refuses("recipe.invalid: 'temprature'"):
        plan(recipe, {"train-align.temprature": [1]}, tmp_path / "out")
    with refuses("tune.out-variable"):
        plan(recipe, VARY, tmp_path / "out", {"out": "elsewhere"})
    with refuses("tune.output-outside"):
        plan(recipe, VARY, tmp_path / "out", {"train-task.out": "elsewhere"})
    recipe.write_text(RECIPE.rpartition("  - search")[0])
    with refuses("tune.last-step: search, evaluate or retrieve"):
        plan(recipe, VARY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_candidates_are_all_combinations() -> None:
    assert len(candidates(VARY)) == 6
    assert candidates({}) == [{}]


def test_the_command_line_runs_a_tiny_model(
    recipe: Path, causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data={tmp_path}", f"base={causal}", "steps=2", "train-align.batch_size=3", "train-task.batch_size=3"]
    vary = ["--vary", "train-align.temperature=0.1,0.5", "train-align.layer=1", "--out", str(tmp_path / "out")]

    def call(*more: str) -> tuple[object, dict[str, Any]]:
        with pytest.raises(SystemExit) as ended:
            main(["search", str(recipe), *given, *vary, "--json", *more])
        return ended.value.code, json.loads(capsys.readouterr().out)

    assert len(call("--dry-run")[1]["trials"]) == 2
    assert not (tmp_path / "out").exists()
    code, document = call()
    assert code in (0, None)
    assert [trial["ran"] for trial in document["trials"]] == [3, 2]
    best = Path(document["best"]["folder"])
    assert (best / "merged" / "adapter_model.safetensors").exists()
    assert [trial["ran"] for trial in call()[1]["trials"]] == [0, 0]


def test_a_wrong_use_is_told(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        ([], "Missing option '--vary'"),
        (["--vary", "x"], "each key must occur once, as KEY=VALUE[,VALUE...]"),
        (["--vary", "x=[]"], "with one value or more"),
        (["--vary", "x=1", "x=2"], "each key must occur once"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["search", str(recipe), "--out", str(tmp_path / "out"), *arguments])
        assert ended.value.code == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("out", ["${out}/../../../victim", "${out}/../victim", "${out}/link/victim", "victim"])
def test_an_output_that_leaves_the_candidate_is_refused_and_nothing_is_removed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("victim", "out/victim", "out/trials/victim", "elsewhere/victim"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "thesis.tex").write_text("years of work")
    (tmp_path / "out" / "trials" / "1").mkdir()
    (tmp_path / "out" / "trials" / "1" / "link").symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "out" / "victim")
    before = contents(tmp_path)
    with refuses("tune.output-outside"):
        tune(recipe, VARY, out="out", overrides={"train-task.out": out}, run=Pretended())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "deep/notes.txt"])
def test_a_file_that_no_step_wrote_is_kept(recipe: Path, tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"vary": {"train-align.temperature": [0.1]}, "out": tmp_path / "out"}
    tune(recipe, run=Pretended(), **settings)
    notes = tmp_path / "out" / "trials" / "1" / "align" / name
    notes.parent.mkdir(exist_ok=True)
    notes.write_text("mine")
    with refuses(f"tune.other-output: '{name}'"):
        tune(recipe, run=Pretended(), overrides={"train-align.rank": 4}, **settings)
    assert notes.read_text() == "mine"


def test_data_of_the_same_size_and_time_run_again(recipe: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"vary": {"train-align.temperature": [0.1]}, "out": tmp_path / "out"}
    tune(recipe, run=Pretended(), overrides={"data": str(tmp_path)}, **settings)
    pairs = next(tmp_path.glob("*-en.tsv"))
    status = pairs.stat()
    pairs.write_bytes(pairs.read_bytes().swapcase())
    os.utime(pairs, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert pairs.stat().st_size == status.st_size
    again = Pretended()
    tune(recipe, run=again, overrides={"data": str(tmp_path)}, **settings)
    assert again.ran == ["train-align", "search"]


def test_an_output_whose_content_somebody_changed_is_not_taken(recipe: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"vary": {"train-align.temperature": [0.1]}, "out": tmp_path / "out"}
    tune(recipe, run=Pretended(), overrides={"data": str(tmp_path)}, **settings)
    weights = tmp_path / "out" / "trials" / "1" / "task" / "settings.json"
    weights.write_bytes(weights.read_bytes() + b"mine")
    again = Pretended()
    with refuses("tune.step-changed"):
        tune(recipe, run=again, overrides={"data": str(tmp_path)}, **settings)
    assert again.ran == []
    assert weights.read_bytes().endswith(b"mine")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"steps": {"x": 1}, "outputs": {}, "files": {}}', "[" * 9999]
)
def test_a_record_of_another_form_is_told(recipe: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "steps.json").write_text(text)
    with refuses("tune.record"):
        tune(recipe, VARY, out=tmp_path / "out", run=Pretended())
