"""Searching a weight without merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix import EvaluateSettings, SearchSettings, evaluate, merge, search, train_align, train_task
from adaptermix.study.trials import Trial, best, grid_search
from tests.train.data import write_slots
from tests.train.test_align import settings_for as align_settings
from tests.train.test_task import settings_for as task_settings


def test_the_grid_is_tried_in_order_as_pairs_that_sum_to_one() -> None:
    trials = grid_search([0.5, 0.9, 1.0], lambda weights: (weights[0], "result"))
    assert [trial.weights for trial in trials] == [(0.5, 0.5), (0.9, 0.1), (1.0, 0.0)]
    assert best(trials).weights == (1.0, 0.0)


def test_among_equals_the_weight_nearest_to_the_first_adapter_alone_wins() -> None:
    trials = [Trial(weights=(w, 1 - w), value=0.3, result=None) for w in (0.5, 0.9, 1.2)]
    assert best(trials).weights[0] == 0.9


@pytest.fixture
def adapters(causal: Path, tmp_path: Path) -> tuple[Path, Path]:
    train_task(task_settings(causal, tmp_path, steps=60))
    train_align(align_settings(causal, tmp_path, steps=40))
    return tmp_path / "task", tmp_path / "align"


def test_a_trial_scores_as_the_adapter_merged_at_its_weight(
    adapters: tuple[Path, Path], causal: Path, tmp_path: Path
) -> None:
    dev = write_slots(tmp_path, "dev.en.jsonl")
    common = {"base": str(causal), "task": "slots", "max_new_tokens": 5, "dtype": "float32", "device": "cpu"}
    out = tmp_path / "found"
    result = search(
        SearchSettings(
            adapters=[str(path) for path in adapters], dev=[dev], grid=[0.3, 0.8, 1.0], out=str(out), **common
        )
    )
    for trial in result.trials:
        merged = tmp_path / f"at-{trial.weights[0]}"
        merge(adapters, weights=trial.weights, out=merged)
        alone = evaluate(EvaluateSettings(adapter=str(merged), data=[dev], **common))
        assert alone.answers == trial.result.answers
        assert alone.overall == trial.result.overall
    merge(adapters, weights=result.chosen.weights, out=tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    manifest = json.loads((out / "adaptermix.json").read_text())
    assert manifest["scores"]["split"] == "dev"
    assert manifest["dev"][0]["name"] == "dev.en.jsonl"
    assert manifest["task"] == {"name": "slots", "template": "plain"}
    assert json.loads((out / "results.json").read_text())["best"]["weights"] == list(result.chosen.weights)


def test_nothing_is_written_while_trials_run(
    adapters: tuple[Path, Path], causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = write_slots(tmp_path, "dev.en.jsonl")
    seen = []
    from adaptermix.study import run

    class Spy(run.Answering):
        def __call__(self, label: str = "generate") -> list[str]:
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            return super().__call__(label)

    monkeypatch.setattr(run, "Answering", Spy)
    settings = {"base": str(causal), "task": "slots", "max_new_tokens": 2, "dtype": "float32", "device": "cpu"}
    search(
        SearchSettings(
            adapters=[str(p) for p in adapters], dev=[dev], grid=[0.5, 0.9], out=str(tmp_path / "x"), **settings
        )
    )
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert "x" not in seen[0]
