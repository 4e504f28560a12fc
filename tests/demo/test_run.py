"""The demo from end to end on a tiny model, stopped and gone on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from adaptermix.cli import main
from adaptermix.cli.console import Console
from adaptermix.cli.show_demo import show
from adaptermix.demo import run as demo
from adaptermix.demo.intents import LANGUAGES
from adaptermix.demo.kinds import KINDS
from adaptermix.demo.plan import Sizes, real_data
from adaptermix.demo.words import label_of, verdict
from adaptermix.options import DemoSettings
from adaptermix.tasks import get_task
from adaptermix.tasks.test_record import read_record

from ..factories import contents
from ..refusals import refuses


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows, steps and tokens."""
    more = {
        "intents": {"sizes": Sizes(train=24, dev=8, test=33, pairs=8), "answering": {"batch_size": 64}},
        "slots": {"answering": {"batch_size": 200, "max_new_tokens": 2}},
    }
    for name, kind in KINDS.items():
        few = {part: {**getattr(kind, part), "steps": 2} for part in ("align", "train")}
        monkeypatch.setitem(KINDS, name, replace(kind, **few, **more[name]))


def check_figures(out: Path) -> None:
    for name in ("layers.png", "weights.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small")
def test_the_demo_measures_everything_and_goes_on_where_it_was(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = DemoSettings(base=str(encoder), out=str(tmp_path / "out"), dtype="float32", device="cpu")
    real_task = demo.train_task

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_task", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(settings)
    kept = (tmp_path / "out" / "stages" / "align.json").read_bytes()
    monkeypatch.setattr(demo, "train_task", real_task)
    results = demo.run_demo(settings)
    assert (tmp_path / "out" / "stages" / "align.json").read_bytes() == kept
    assert set(results["test"]) - {"closed form"} == {"task only", "chosen"}  # the base has no head to answer with
    assert results["closed_form"]["search"]["trials"][0]["scores"] == results["search"]["trials"][0]["scores"]
    assert [trial["weights"] for trial in results["search"]["trials"]] == [[1, 0], [1, 0.25], [1, 0.5], [1, 1]]
    assert set(results["test"]["chosen"]["groups"]) == {"supervised", "aligned", "transfer", "all"}
    members = {role: set(names) for role, names in results["test"]["chosen"]["members"].items()}
    assert members.pop("all") == set(LANGUAGES)
    assert members == {
        "supervised": {"en"},
        "aligned": {"ht", "lb", "oc", "pap"},
        "transfer": {"de", "es", "fr"},
    }
    check_figures(tmp_path / "out")
    trained = json.loads((tmp_path / "out" / "align" / "adaptermix.json").read_text())["objective"]
    assert results["layer"] == trained["layer"] == trained["layers"] // 2  # of another base than the demo's own
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seconds"] == pytest.approx(results["seconds"])
    show(results, settings, Console())
    shown = capsys.readouterr().err
    for piece in (
        "task only",
        "task + 0.5 alignment",
        "task + 1 closed form",
        "with alignment adapter",
        "s/step",
        "not aligned",
        "Next:",
    ):
        assert piece in shown
    assert {entry.name for entry in read_record().entries} == {f"test.{language}.jsonl" for language in LANGUAGES}


@pytest.mark.usefixtures("small")
def test_slots_are_read_out_by_a_language_model(causal: Path, tmp_path: Path) -> None:
    settings = DemoSettings(task="slots", base=str(causal), out=str(tmp_path / "out"), dtype="float32", device="cpu")
    results = demo.run_demo(settings)
    assert list(results["test"]) == ["base", "task only", "chosen"]
    assert [trial["weights"][0] for trial in results["search"]["trials"]] == [0.5, 0.7, 0.9, 1.0]
    check_figures(tmp_path / "out")


def test_the_gain_is_resampled_by_sentence_pattern() -> None:
    """Rows of one pattern are right or wrong together, so ten rows of two patterns are no surer than two rows."""
    metric = get_task("classify").metrics([])[0]

    def result(right: list[bool], each: int) -> dict:
        rows = [[float(is_right), 1.0] for is_right in right for _ in range(each)]
        return {"counts": {"de": {"rows": rows, "clusters": [str(n) for n in range(len(right)) for _ in range(each)]}}}

    few, many = (
        demo.difference(metric, result([False] * 8, each), result([True] * 6 + [False] * 2, each), ["de"], 0)
        for each in (1, 10)
    )
    assert few["value"] == many["value"] == 0.75
    assert many["low"] == pytest.approx(few["low"], abs=0.06)


def test_tables_name_what_was_tested_by_its_weights() -> None:
    results = {
        "search": {"best": {"weights": [1.0, 0.5]}},
        "closed_form": {"search": {"best": {"weights": [1.0, 1.0]}}},
    }
    names = [label_of(name, results) for name in ("base", "task only", "chosen", "closed form")]
    assert names == ["base", "task only", "task + 0.5 alignment", "task + 1 closed form"]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.1, "helps"), (-0.1, -0.01, "hurts"), (-0.1, 0.1, "is not distinguishable from chance")],
)
def test_the_verdict_is_what_the_interval_says(low: float, high: float, said: str) -> None:
    found = {"value": (low + high) / 2, "low": low, "high": high, "n": 9}
    results = {
        "score": "accuracy",
        "difference": {"without task data": found},
        "search": {"best": {"weights": [0.9, 0.1]}},
    }
    assert said in verdict(results)
    results["search"] = {"best": {"weights": [1.0, 0.5]}}
    assert said in verdict(results)
    results["search"] = {"best": {"weights": [1.0, 0.0]}}
    assert "task adapter alone was chosen" in verdict(results)


def test_the_recipe_trains_what_the_demo_trains() -> None:
    steps = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "quickstart.yaml").read_text())["steps"]
    found = {name: settings for step in steps for name, settings in step.items()}
    kind = next(iter(KINDS.values()))
    training = {name: value for name, value in kind.training.items() if name != "checkpoint_every"}
    assert dict(kind.align) | {"layer": kind.align_layer} | training == {
        name: value for name, value in found["train-align"].items() if name not in ("base", "pairs", "out")
    }
    assert dict(kind.train) | training | {"task": kind.task} == {
        name: value for name, value in found["train-task"].items() if name not in ("base", "train", "out")
    }
    assert dict(kind.search).items() <= found["search"].items()


@pytest.mark.parametrize("task", KINDS)
def test_dev_test_and_training_do_not_overlap(tmp_path: Path, task: str) -> None:
    plan = KINDS[task].own_data(tmp_path, KINDS[task].sizes, seed=3)
    texts = {}
    for name in ("train", "dev", "test"):
        files, _ = getattr(plan, name)
        texts[name] = {json.loads(line)["text"] for file in files for line in Path(file).read_text().splitlines()}
    files, _ = plan.pairs
    texts["pairs"] = {
        side for file in files for line in Path(file).read_text().splitlines() for side in line.split("\t")
    }
    assert not texts["test"] & (texts["train"] | texts["dev"] | texts["pairs"])
    assert not texts["dev"] & (texts["train"] | texts["pairs"])


def test_a_folder_without_the_real_data_is_refused(tmp_path: Path) -> None:
    with refuses("demo.data: en"):
        real_data(tmp_path)


def test_the_demo_needs_no_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda settings, *, watch: seen.append(settings) or {"seconds": 0})
    monkeypatch.setattr("adaptermix.cli.show_demo.show", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--json"])
    assert caught.value.code == 0
    with pytest.raises(SystemExit):
        main(["demo"])
    assert [settings.out for settings in seen] == ["demo-out"] * 2
    assert "Usage" not in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(causal: Path, tmp_path: Path) -> None:
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with refuses("demo.folder"):
            demo.run_demo(DemoSettings(base=str(causal), out=str(tmp_path), device="cpu", fresh=fresh))
    assert (tmp_path / "align" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("mine", ["stages/mine.json", "stages/mine/key.json", "results.json"])
def test_a_project_that_has_a_folder_of_the_same_name_is_left_alone(causal: Path, tmp_path: Path, mine: str) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("mine")
    before = contents(tmp_path)
    for fresh in (False, True):
        with refuses("demo.folder"):
            demo.run_demo(DemoSettings(base=str(causal), out=str(tmp_path), device="cpu", fresh=fresh))
    assert contents(tmp_path) == before


def test_another_seed_is_not_mixed_into_an_earlier_demo(causal: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert demo.Demo(settings=DemoSettings(base=str(causal), out=out, device="cpu")).key["seed"] == 0
    with refuses("demo.other-settings"):
        _ = demo.Demo(settings=DemoSettings(base=str(causal), out=out, device="cpu", seed=1)).key
    assert demo.Demo(settings=DemoSettings(base=str(causal), out=out, device="cpu", seed=1, fresh=True)).key


def test_published_data_are_for_slots_only(tmp_path: Path) -> None:
    with refuses("demo.data-task"):
        DemoSettings(data=str(tmp_path))


def test_another_task_is_not_mixed_into_an_earlier_demo(causal: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = demo.Demo(settings=DemoSettings(base=str(causal), out=out, device="cpu"))
    assert first.key["task"] == "intents"
    with refuses("demo.other-settings"):
        _ = demo.Demo(settings=DemoSettings(task="slots", base=str(causal), out=out, device="cpu")).key
