"""The demo from end to end on a tiny model, stopped and gone on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.cli import main
from adaptermix.cli.console import Console
from adaptermix.cli.demo_command import show, verdict
from adaptermix.demo import run as demo
from adaptermix.demo.plan import own_data, real_data
from adaptermix.errors import DataError, OutputError
from adaptermix.settings import DemoSettings

from ..factories import contents


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps and tokens."""
    monkeypatch.setattr(demo, "_ALIGN_STEPS", 2)
    monkeypatch.setattr(demo, "_TASK_STEPS", 2)
    monkeypatch.setattr(demo, "_GENERATION", {"batch_size": 200, "max_new_tokens": 2})


@pytest.mark.usefixtures("small")
def test_the_demo_measures_everything_and_goes_on_where_it_was(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = DemoSettings(base=str(causal), out=str(tmp_path / "out"), dtype="float32", device="cpu")
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
    assert set(results["test"]) == {"base", "task only", "chosen"}
    assert [trial["weights"][0] for trial in results["search"]["trials"]] == [0.5, 0.7, 0.9, 1.0]
    assert len(results["retrieval"]["after"]["layers"]) == 5
    assert set(results["test"]["chosen"]["groups"]) == {"supervised", "aligned", "transfer", "all"}
    for name in ("layers.png", "weights.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seconds"] == pytest.approx(results["seconds"])
    show(results, settings.out, Console())
    shown = capsys.readouterr().err
    for piece in ("task only", "merged 0.5/0.5", "with alignment adapter", "s/step", "chosen weight minus task only"):
        assert piece in shown


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.01, 0.1, "helped"), (-0.1, -0.01, "hurt"), (-0.1, 0.1, "no difference beyond noise")]
)
def test_the_verdict_is_what_the_interval_says(low: float, high: float, said: str) -> None:
    found = {"value": (low + high) / 2, "low": low, "high": high, "n": 9}
    results = {"difference": {"not in task training": found}, "search": {"best": {"weights": [0.9, 0.1]}}}
    assert said in verdict(results)
    results["search"] = {"best": {"weights": [1.0, 0.0]}}
    assert "task adapter alone was chosen" in verdict(results)


def test_dev_test_and_training_do_not_overlap(tmp_path: Path) -> None:
    plan = own_data(tmp_path)
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
    with pytest.raises(DataError, match=r"en\.train\.tsv\.gz"):
        real_data(tmp_path)


def test_the_demo_needs_no_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda settings, *, watch: seen.append(settings) or {"seconds": 0})
    monkeypatch.setattr("adaptermix.cli.demo_command.show", lambda *_: None)
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
        with pytest.raises(OutputError, match="holds other things"):
            demo.run_demo(DemoSettings(base=str(causal), out=str(tmp_path), device="cpu", fresh=fresh))
    assert (tmp_path / "align" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("mine", ["stages/mine.json", "stages/mine/key.json", "results.json"])
def test_a_project_that_has_a_folder_of_the_same_name_is_left_alone(causal: Path, tmp_path: Path, mine: str) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("mine")
    before = contents(tmp_path)
    for fresh in (False, True):
        with pytest.raises(OutputError, match="holds other things"):
            demo.run_demo(DemoSettings(base=str(causal), out=str(tmp_path), device="cpu", fresh=fresh))
    assert contents(tmp_path) == before


def test_another_seed_is_not_mixed_into_an_earlier_demo(causal: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert demo.Demo(settings=DemoSettings(base=str(causal), out=out, device="cpu")).key["seed"] == 0
    with pytest.raises(OutputError, match="Pass --fresh"):
        _ = demo.Demo(settings=DemoSettings(base=str(causal), out=out, device="cpu", seed=1)).key
    assert demo.Demo(settings=DemoSettings(base=str(causal), out=out, device="cpu", seed=1, fresh=True)).key
