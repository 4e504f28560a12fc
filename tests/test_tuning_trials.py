"""A recipe's settings proposed by a sampler, and candidates that are stopped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptermix.cli import main
from adaptermix.commands.recipe_file import Step
from adaptermix.errors import ModelError
from adaptermix.progress import SILENT, Look, Watcher
from adaptermix.tuning import Tuning, check, tune
from adaptermix.tuning.pruning import Curve, PruningWatcher, Stopped
from adaptermix.weight_search.parameters import Choice, Interval
from tests.training.data import Notes, write_pairs, write_slots

from .refusals import refuses

RECIPE = """
version: 1
variables: {out: unset, base: none, data: none, steps: 3, dev: []}
steps:
  - train-task: {base: "${base}", task: slots, train: ["${data}/train.en.jsonl"], out: "${out}/task", steps: "${steps}"}
  - train-align: {base: "${base}", pairs: ["${data}/*-en.tsv"], out: "${out}/align", steps: "${steps}",
                  dev_pairs: "${dev}", batch_size: 3}
  - search: {adapters: ["${out}/task", "${out}/align"], base: "${base}", task: slots, dev: ["${data}/train.en.jsonl"],
             grid: [0.5, 0.9], max_new_tokens: 2, out: "${out}/merged"}
"""
LAYERS = Interval(1, 12, whole=True)
VARY: dict[str, str | list[Any] | Interval | Choice] = {
    "train-align.temperature": "0.01:10:log",
    "train-align.layer": LAYERS,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    write_pairs(tmp_path)
    write_slots(tmp_path)
    return path


def planted(align: dict[str, Any]) -> float:
    """Best at temperature 0.3 and layer 8."""
    return 1 - abs(math.log10(align["temperature"] / 0.3)) / 3 - abs(align["layer"] - 8) / 24


class Pretended:
    """Steps that leave their settings behind; training looks at dev data where it has any."""

    def __init__(
        self,
        worth: Callable[[dict[str, Any]], float] = planted,
        *,
        fails_at: int = 0,
        curve: Callable[[dict[str, Any]], list[float]] = lambda _align: [],
    ) -> None:
        self.ran: list[str] = []
        self._worth, self._fails_at, self._curve = worth, fails_at, curve

    def __call__(self, step: Step, *, watch: Watcher = SILENT) -> dict[str, Any]:
        self.ran.append(step.command)
        if len(self.ran) == self._fails_at:
            raise ModelError("as asked")
        settings = step.settings.model_dump(mode="json")
        out = Path(settings["out"])
        partial = out.with_name(f".{out.name}.partial")
        partial.mkdir(parents=True)
        if settings.get("dev_pairs"):
            for number, value in enumerate(self._curve(settings), start=1):
                watch.look(Look(step=number, measure="dev_accuracy", value=value, higher=True))
        partial.rename(out)
        (out / "settings.json").write_text(json.dumps(settings))
        if step.command != "search":
            return {"out": str(out)}
        value = self._worth(json.loads((Path(settings["adapters"][1]) / "settings.json").read_text()))
        return {"best": {"weights": [0.9, 0.1], "value": value, "low": value - 0.1, "high": value + 0.1}}


def tried(found: Tuning) -> list[tuple[float, int]]:
    return [
        (trial.settings["train-align.temperature"], trial.settings["train-align.layer"]) for trial in found.candidates
    ]


class TestSamplers:
    @pytest.mark.parametrize(
        ("sampler", "trials"), [("random", 60), ("tpe", 40), ("gp", 20), ("cmaes", 60), ("auto", 20)]
    )
    def test_a_planted_optimum_is_found(self, sampler: str, trials: int, recipe: Path, tmp_path: Path) -> None:
        found = tune(recipe, VARY, out=tmp_path / "out", trials=trials, sampler=sampler, run=Pretended())
        assert len(set(tried(found))) == trials
        assert all(0.01 <= heat <= 10 and layer in range(1, 13) for heat, layer in tried(found))
        assert all(isinstance(layer, int) for _, layer in tried(found))
        assert found.best.value == max(trial.value or 0 for trial in found.candidates) > 0.85
        assert json.loads((tmp_path / "out" / "results.json").read_text()) == found.document()

    def test_log_ranges_are_tried_evenly_in_ratios(self, recipe: Path, tmp_path: Path) -> None:
        found = tune(recipe, VARY, out=tmp_path / "out", trials=60, sampler="random", run=Pretended())
        assert 10 <= sum(heat < 0.1 for heat, _ in tried(found)) <= 30  # a third of the decades

    def test_the_seed_decides(self, recipe: Path, tmp_path: Path) -> None:
        runs = [
            tried(tune(recipe, VARY, out=tmp_path / name, trials=3, seed=seed, run=Pretended()))
            for name, seed in (("a", 0), ("b", 0), ("c", 1))
        ]
        assert runs[0] == runs[1] != runs[2]

    def test_values_are_tried_once_and_lists_stay_lists(self, recipe: Path, tmp_path: Path) -> None:
        vary = {
            "train-align.targets": Choice((["q_proj", "v_proj"], ["all-linear"])),
            "train-align.layer": Choice((1, 2)),
        }
        notes = Notes()
        found = tune(
            recipe, vary, out=tmp_path / "out", trials=9, run=Pretended(lambda align: align["layer"]), watch=notes
        )
        assert len(found.candidates) == 4
        assert notes.said[-1] == "all 4 candidates were tried."
        seen = json.loads((found.candidates[0].folder / "align" / "settings.json").read_text())
        assert seen["targets"] == found.candidates[0].settings["train-align.targets"]


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "cmaes"])
def test_a_search_that_goes_on_tries_the_same(sampler: str, recipe: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"trials": 10, "sampler": sampler, "overrides": {"data": str(tmp_path)}}
    unbroken = tune(recipe, VARY, out=tmp_path / "one", run=Pretended(), **how)
    first, second, third = Pretended(fails_at=6), Pretended(fails_at=13), Pretended()
    for run in (first, second):
        with pytest.raises(ModelError):
            tune(recipe, VARY, out=tmp_path / "two", run=run, **how)
    found = tune(recipe, VARY, out=tmp_path / "two", run=third, **how)
    same = 3 if sampler == "cmaes" else 10  # those of before the first interruption
    assert tried(found)[:same] == tried(unbroken)[:same]
    assert len(first.ran) + len(second.ran) + len(third.ran) == 21 + 2  # the task once; what failed is run again
    again = Pretended()
    more = tune(recipe, VARY, out=tmp_path / "two", run=again, **how | {"trials": 11})
    assert tried(more)[:10] == tried(found)
    assert again.ran == ["train-align", "search"]


class TestRefusals:
    def test_options_that_do_not_go_together(self, recipe: Path, tmp_path: Path) -> None:
        def fails(words: str, **more: Any) -> None:
            with refuses(words):
                tune(recipe, more.pop("vary", VARY), out=tmp_path / "out", run=Pretended(), **more)
            assert not (tmp_path / "out").exists()

        fails("vary.range-in-grid: --vary train-align.temperature")
        fails("tune.sampler", sampler="tpe")
        fails("tune.prune-no-dev", trials=4, prune=True)
        fails(
            "recipe.invalid: temperature: ",
            trials=4,
            vary={"train-align.temperature": Interval(-1.0, 1.0)},
        )
        dev = {"dev": [str(tmp_path / "fr-en.tsv")]}
        fails("tune.prune-sampler: gp", trials=4, prune=True, sampler="gp", overrides=dev)

    def test_another_search_in_its_folder(self, recipe: Path, tmp_path: Path) -> None:
        tune(recipe, VARY, out=tmp_path / "out", trials=2, sampler="tpe", run=Pretended())
        with refuses(
            r"tune.other-search: temperature 0\.01:10\.0:log.*sampler tpe.*temperature 0\.01:10\.0:log.*sampler random"
        ):
            tune(recipe, VARY, out=tmp_path / "out", trials=2, sampler="random", run=Pretended())

    def test_other_settings_than_those_of_the_candidates_before(self, recipe: Path, tmp_path: Path) -> None:
        tune(recipe, VARY, out=tmp_path / "out", trials=2, run=Pretended())
        before = sorted(path.read_bytes() for path in (tmp_path / "out").rglob("*.json"))
        with refuses("tune.other-files"):
            tune(recipe, VARY, out=tmp_path / "out", trials=2, overrides={"train-align.rank": 4}, run=Pretended())
        assert before == sorted(path.read_bytes() for path in (tmp_path / "out").rglob("*.json"))

    def test_several_processes(self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("adaptermix.tuning.run.process_count", lambda: 2)
        with refuses("tune.processes: 2"):
            check(recipe, {"train-align.layer": [1]}, out=tmp_path / "out")

    def test_only_stopped_candidates(self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Behind trainings of other settings that the folder holds."""
        shared = {"data": str(tmp_path), "dev": [str(tmp_path / "fr-en.tsv")]}
        vary = {"train-align.rank": [1, 2, 3, 4]}
        for level, ended in ((0.9, False), (0.1, True)):
            run = Pretended(lambda _: 0.5, curve=lambda _, level=level: [level] * 2)  # type: ignore[misc]
            monkeypatch.setattr("adaptermix.tuning.run.run_step", run)
            how: dict[str, Any] = {"out": tmp_path / "out", "prune": True}
            if ended:
                with refuses("tune.all-stopped"):
                    tune(recipe, vary, overrides=shared | {"train-align.alpha": 1}, **how)
            else:
                tune(recipe, vary, overrides=shared, **how)


class TestPruning:
    @pytest.fixture
    def pruned(self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tuning]:
        """Search with a runner whose training gets better from look to look, and the more the smaller its rank is."""

        def search(run: Pretended, **more: Any) -> Tuning:
            monkeypatch.setattr("adaptermix.tuning.run.run_step", run)
            shared = {"data": str(tmp_path), "dev": [str(tmp_path / "fr-en.tsv")]}
            vary = more.pop("vary", {"train-align.rank": [4, 2, 8, 1, 16, 3, 32]})
            how = {"out": tmp_path / "out", "prune": True, "overrides": shared} | more
            return tune(recipe, vary, **how)

        return search

    @staticmethod
    def runner(**more: Any) -> Pretended:
        worth = more.pop("worth", lambda align: align["rank"] / 100)
        return Pretended(worth, curve=lambda align: [k / 10 - align["rank"] / 100 for k in (1, 2, 3)], **more)

    def test_what_is_behind_the_median_is_stopped_and_never_best(
        self, pruned: Callable[..., Tuning], tmp_path: Path
    ) -> None:
        run = self.runner()
        found = pruned(run)
        assert [bool(trial.pruned) for trial in found.candidates] == [False] * 4 + [True, False, True]
        assert found.best.settings == {"train-align.rank": 8}  # 32 would have scored more
        stopped = found.candidates[4]
        assert (stopped.value, stopped.low, stopped.high) == (None, None, None)
        assert stopped.document()["pruned"] == {
            "command": "train-align",
            "step": 2,  # no first look stops anything
            "measure": "dev_accuracy",
            "value": pytest.approx(0.2 - 0.16),
            "median": pytest.approx(0.2 - 0.03),
        }
        assert run.ran.count("search") == 5
        assert not list((tmp_path / "out" / "trials" / "5").glob("*align*"))
        assert not list((tmp_path / "out" / "trials" / "5").glob(".*"))

    def test_stopped_ones_stay_so_and_run_whole_without_prune(
        self, pruned: Callable[..., Tuning], tmp_path: Path
    ) -> None:
        first = pruned(self.runner())
        again = self.runner()
        same = pruned(again)
        assert again.ran == []
        assert [(trial.settings, trial.value, trial.pruned) for trial in same.candidates] == [
            (trial.settings, trial.value, trial.pruned) for trial in first.candidates
        ]
        rest = self.runner()
        whole = pruned(rest, prune=False)
        assert rest.ran == ["train-align", "search"] * 2
        assert whole.best.settings == {"train-align.rank": 32}

    def test_the_sampler_learns_of_it_and_goes_on_the_same(self, pruned: Callable[..., Tuning], tmp_path: Path) -> None:
        how: dict[str, Any] = {"vary": {"train-align.rank": Interval(1, 64, whole=True)}, "trials": 14}
        unbroken = pruned(self.runner(), **how)
        assert sum(bool(trial.pruned) for trial in unbroken.candidates) > 2
        with pytest.raises(ModelError):
            pruned(self.runner(fails_at=16), out=tmp_path / "two", **how)
        found = pruned(self.runner(), out=tmp_path / "two", **how)
        seen = [[(trial.settings, trial.value, trial.pruned) for trial in one.candidates] for one in (found, unbroken)]
        assert seen[0] == seen[1]

    def test_looks_at_other_layers_are_not_compared_and_it_is_told(self, pruned: Callable[..., Tuning]) -> None:
        notes = Notes()
        vary = {"train-align.rank": [4, 2, 8, 1, 16], "train-align.layer": [1, 2, 3]}
        assert [bool(trial.pruned) for trial in pruned(self.runner(), vary=vary, watch=notes).candidates] == (
            [False] * 12 + [True] * 3
        )
        assert notes.said[0].startswith("--prune compares only training with equal train-align.layer")

    def test_temperatures_are_compared(self, pruned: Callable[..., Tuning]) -> None:
        notes = Notes()
        curve = Pretended(lambda _: 0.5, curve=lambda align: [0.5, 1 - align["temperature"]])
        found = pruned(curve, vary={"train-align.temperature": [0.1, 0.2, 0.3, 0.4, 0.5, 0.05]}, watch=notes)
        assert [bool(trial.pruned) for trial in found.candidates] == [False] * 4 + [True, False]
        assert notes.said[0] == "candidate 1 of 6: train-align.temperature 0.1"

    def test_what_was_run_whole_and_is_gone_is_run_whole_again(
        self, pruned: Callable[..., Tuning], tmp_path: Path
    ) -> None:
        vary = {"train-align.rank": [32, 4, 2, 8, 1]}
        first = pruned(self.runner(), vary=vary)
        shutil.rmtree(tmp_path / "out" / "trials" / "1" / "align")
        run = self.runner()
        again = pruned(run, vary=vary)
        assert run.ran == ["train-align"]
        assert [trial.value for trial in again.candidates] == [trial.value for trial in first.candidates]
        assert not any(trial.pruned for trial in again.candidates)

    def test_equals_are_not_stopped(self, pruned: Callable[..., Tuning]) -> None:
        found = pruned(Pretended(lambda _: 0.5, curve=lambda _: [0.9, 0.9, 0.9]))
        assert not any(trial.pruned for trial in found.candidates)


def test_the_best_of_a_curve_is_that_up_to_a_look() -> None:
    curve = Curve("a", "dev_loss", higher=False, looks=[(5, 3.0), (10, 2.0), (15, 2.5)])
    assert curve.bests() == {5: 3.0, 10: 2.0, 15: 2.0}


def test_a_look_of_nan_stops_nothing_and_is_no_best() -> None:
    """optuna's pruner stops a trial of NaN at once, whatever the others have."""
    curves = [
        Curve("a", "dev_loss", higher=False, looks=[(5, value), (10, value), (15, value)])
        for value in (1.0, 2.0, 3.0, 4.0)
    ]
    curve = Curve("a", "dev_loss", higher=False)
    watcher = PruningWatcher(SILENT, "train-task", curve, curves, lambda _step, _value: None)
    watcher.look(Look(step=5, measure="dev_loss", value=math.nan, higher=False))
    assert curve.bests() == {}
    with pytest.raises(Stopped):
        watcher.look(Look(step=10, measure="dev_loss", value=3.0, higher=False))
    assert curve.bests() == {10: 3.0}


def test_a_tiny_model_is_stopped_and_resumed(
    recipe: Path, causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that is far too low is behind on the dev loss of the task."""
    text = RECIPE.replace('train: ["${data}/train.en.jsonl"]', 'train: ["${data}/train.en.jsonl"], dev: "${dev}"')
    recipe.write_text(text.replace('${dev}", batch', '${pairs}", batch').replace("dev: []", "dev: [], pairs: []"))
    given = [f"data={tmp_path}", f"base={causal}", "steps=3", f"dev=[{tmp_path}/train.en.jsonl]"]
    given += [f"pairs=[{tmp_path}/fr-en.tsv]", "train-align.evaluate_every=1", "train-task.evaluate_every=1"]
    vary = ["--vary", "train-task.learning_rate=1e-2,9e-3,8e-3,7e-3,1e-6", "--out", str(tmp_path / "out"), "--prune"]

    def call(*more: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            main(["search", str(recipe), *given, *vary, "--json", *more])
        assert ended.value.code in (0, None)
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    document = call()
    stopped = [trial["pruned"] for trial in document["trials"]]
    assert stopped[:4] == [None] * 4
    assert (stopped[4]["command"], stopped[4]["step"], stopped[4]["measure"]) == ("train-task", 2, "dev_loss")
    assert stopped[4]["value"] > stopped[4]["median"]
    assert document["best"]["pruned"] is None
    assert not list((tmp_path / "out").rglob("5/*"))
    known = json.loads((tmp_path / "out" / "steps.json").read_text())["steps"].values()
    assert {entry["looks"]["measure"] for entry in known if "looks" in entry} == {"dev_loss", "dev_accuracy"}
    assert [trial["ran"] for trial in call()["trials"]] == [0] * 5
    planned = call("--dry-run", "--trials", "3")
    assert (planned["trials"], planned["sampler"]) == (3, "tpe")


def test_the_command_line_proposes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("adaptermix.tuning.run.run_step", Pretended())
    vary = ["--vary", "train-align.temperature=0.01:10:log", "train-align.layer=1:12", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(["search", str(recipe), *vary, "--trials", "3", "--json"])
    assert ended.value.code in (0, None)
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["trials"]) == 3
    assert "[I " not in shown.err  # optuna's log
    for wrong, says in (("x=5:1:log", "LOW < HIGH"), ("x=0:1:log", "LOW above 0"), ("x=1:2:lin", "LOW:HIGH:log")):
        with pytest.raises(SystemExit) as ended:
            main(["search", str(recipe), "--vary", wrong, "--trials", "3", "--out", str(tmp_path / "other")])
        assert ended.value.code == 2
        assert says in " ".join(capsys.readouterr().err.split())
