"""Whether the best of many recipes is better than the first beyond chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptermix.commands.judge import run_judge
from adaptermix.options import EvaluateSettings
from adaptermix.tuning.report import Pruned, RecipeTrial, Tuning


def candidates(rights: list[np.ndarray], stopped: int = 0) -> list[RecipeTrial]:
    """Candidates with accuracy on the same rows, resampled alike."""
    rows = len(rights[0])
    weights = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=1000)
    found = [
        RecipeTrial(
            settings={"n": number},
            folder=Path(str(number)),
            value=float(right.mean()),
            low=0.0,
            high=1.0,
            ran=1,
            resamples=[float(right.mean()), *(weights @ right / rows)],
            rows=rows,
        )
        for number, right in enumerate(rights)
    ]
    pruned = Pruned(command="train-task", step=1, measure="dev_loss", value=1.0, median=0.5)
    more = [
        RecipeTrial(settings={}, folder=Path("x"), value=None, low=None, high=None, ran=1, pruned=pruned)
        for _ in range(stopped)
    ]
    return [*found, *more]


def test_of_many_recipes_that_are_all_alike_the_best_is_seldom_found():
    """24 recipes, each right by its own coin; without a correction the best would be found in half of the searches."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        right = [(rng.random(120) < 0.6).astype(float) for _ in range(24)]
        verdict = Tuning.of(candidates(right), Path("o")).verdict
        assert verdict is not None
        found.append(verdict.is_found)
    assert np.mean(found) <= 0.1


def test_a_real_gain_is_found_and_said():
    first = (np.arange(200) < 100).astype(float)
    better = (np.arange(200) < 140).astype(float)
    result = Tuning.of(candidates([first, first, better]), Path("o"))
    assert result.verdict is not None
    assert result.verdict.is_found
    assert result.verdict.difference.value == pytest.approx(0.2)
    assert result.document()["verdict"]["tried"] == 3
    assert "the best is better than the first candidate: +0.200" in result.verdict.sentence()


def test_a_gain_of_all_of_few_rows_has_an_interval_with_a_width():
    verdict = Tuning.of(candidates([np.zeros(12), np.ones(12)]), Path("o")).verdict
    assert verdict is not None
    # the error about 0 of twelve gains of 1 is 1 / sqrt(12)
    found = verdict.difference
    assert (found.value, found.low, found.high) == pytest.approx(
        (1.0, 1 - 1.96 / 12**0.5, 1 + 1.96 / 12**0.5), abs=1e-3
    )


def test_candidates_that_were_stopped_count():
    rng = np.random.default_rng(1)
    first = (rng.random(200) < 0.5).astype(float)
    better = np.where(rng.random(200) < 0.2, 1.0, first)
    verdict, more = (Tuning.of(candidates([first, better], stopped), Path("o")).verdict for stopped in (0, 9))
    assert verdict is not None
    assert more is not None
    assert more.chance == pytest.approx(min(1.0, 10 * verdict.chance))


def test_the_first_is_not_better_than_itself_and_unknown_rows_give_no_verdict():
    first, worse = np.ones(20), np.zeros(20)
    verdict = Tuning.of(candidates([first, worse]), Path("o")).verdict
    assert verdict is not None
    assert (verdict.chance, verdict.sentence()) == (1.0, "no candidate is better than the first.")
    alone = RecipeTrial(settings={}, folder=Path("x"), value=0.5, low=None, high=None, ran=1)
    assert Tuning.of([alone, alone], Path("o")).verdict is None


def test_a_judge_gives_its_resamples(causal: Path, tmp_path: Path) -> None:
    data = tmp_path / "en.jsonl"
    data.write_text("".join(json.dumps({"text": f"t{n}", "label": "ab"[n % 2]}) + "\n" for n in range(8)))
    settings = EvaluateSettings(
        base=str(causal), task="classify", data=[str(data)], max_new_tokens=2, dtype="float32", device="cpu"
    )
    document = run_judge(settings)
    assert len(document["resamples"]) == 1001
    assert document["resamples"][0] == pytest.approx(document["overall"]["value"])
    assert document["units"] == 8


def test_a_judge_counts_texts_of_questions_rather_than_questions(causal: Path, tmp_path: Path) -> None:
    data = tmp_path / "en.jsonl"
    rows = [{"question": f"q{n}?", "context": f"Text {n % 3}", "answers": ["Text"]} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluateSettings(
        base=str(causal), task="qa", data=[str(data)], max_new_tokens=2, dtype="float32", device="cpu"
    )
    assert run_judge(settings)["units"] == 3
