"""Searching a weight without merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix import EvaluateSettings, SearchSettings, evaluate, merge, search, train_align, train_task
from tests.adapters.test_paths import assert_sums, loaded, save, under
from tests.training.data import write_slots
from tests.training.test_align import settings_for as align_settings
from tests.training.test_task import settings_for as task_settings


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
    for trial, score in zip(result.trials, result.scores, strict=True):
        weights = trial.candidate.weights
        merged = tmp_path / f"at-{weights[0]}"
        merge(adapters, weights=weights, out=merged)
        alone = evaluate(EvaluateSettings(adapter=str(merged), data=[dev], **common))
        assert alone.answers == list(trial.answers)
        assert alone.overall == score
    merge(adapters, weights=result.chosen.candidate.weights, out=tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    manifest = json.loads((out / "adaptermix.json").read_text())
    assert manifest["scores"]["split"] == "dev"
    assert manifest["dev"][0]["name"] == "dev.en.jsonl"
    assert manifest["task"] == {"name": "slots", "template": "plain"}
    assert json.loads((out / "results.json").read_text())["best"]["weights"] == list(result.chosen.candidate.weights)


def test_only_the_journal_is_written_while_trials_run(
    adapters: tuple[Path, Path], causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = write_slots(tmp_path, "dev.en.jsonl")
    before = {path.name for path in tmp_path.iterdir()}
    seen = []
    from adaptermix.weight_search import run

    class Spy(run.Answering):
        def together(self, asked: Any, choose: Any, label: str) -> list[list[str]]:
            seen.append((len(asked), {path.name for path in tmp_path.iterdir()} - before))
            return super().together(asked, choose, label)

    monkeypatch.setattr(run, "Answering", Spy)
    settings = {"base": str(causal), "task": "slots", "max_new_tokens": 2, "dtype": "float32", "device": "cpu"}
    search(
        SearchSettings(
            adapters=[str(p) for p in adapters], dev=[dev], grid=[0.5, 0.9], out=str(tmp_path / "x"), **settings
        )
    )
    written = {".x.partial", ".x.adaptermix-lock"}
    assert seen == [(1, written), (2, written)]  # the task adapter alone, and two candidates
    assert {path.name for path in tmp_path.iterdir()} - before == {"x"}


def test_what_is_written_has_the_paths_of_the_model_that_scored_it(causal: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    targets = {"one": ["q_proj"], "two": ["v_proj"]}
    for number, (name, modules) in enumerate(targets.items()):
        save(AutoModel.from_pretrained(causal), tmp_path / name, seed=number, target_modules=modules)
    common = {"base": str(causal), "task": "slots", "max_new_tokens": 2, "dtype": "float32", "device": "cpu"}
    dev = write_slots(tmp_path, "dev.en.jsonl")
    out = tmp_path / "found"
    folders = [tmp_path / name for name in targets]
    result = search(
        SearchSettings(adapters=[str(folder) for folder in folders], dev=[dev], grid=[0.3], out=str(out), **common)
    )
    added = [under("model", loaded(AutoModel.from_pretrained(causal), folder)[0]) for folder in folders]
    weights = result.chosen.candidate.weights
    assert_sums(AutoModelForCausalLM.from_pretrained(causal), out, list(zip(weights, added, strict=True)))
    evaluate(EvaluateSettings(adapter=str(out), data=[dev], **common))
