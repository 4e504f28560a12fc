"""Macro F1 as the headline metric: it names the scores, decides searches and compares systems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sklearn.metrics import f1_score

from adaptermix import compare_systems, evaluate, search, train_align, train_task
from adaptermix.evaluation.run import score_answers
from adaptermix.options import AlignSettings, CompareSettings, EvaluateSettings, SearchSettings, TaskSettings
from adaptermix.tasks import TASKS

ROWS = {
    "classify": "rot\ta\nblau\tb\ngelb\ta\nweiss\ta\n",
    "nli": "rot\tblau\tneutral\nrot\tRot\tentailment\nrot\tgelb\tneutral\n",
    "pairs": "rot\tblau\t0\nrot\tRot\t1\nrot\tgelb\t0\n",
    "choice": "".join(
        json.dumps({"question": f"q{n}", "choices": ["rot", "blau", "gelb"], "answer": right}) + "\n"
        for n, right in enumerate([0, 1, 1, 2])
    ),
    "pos": "Ada\tPROPN\nging\tVERB\n\nBath\tPROPN\n",
}
COMMON = {"device": "cpu", "dtype": "float32", "metric": "macro_f1"}


def test_every_task_with_labels_or_tags_of_all_words_has_it(tmp_path: Path) -> None:
    for name, text in ROWS.items():
        path = tmp_path / f"de.{name}.{'jsonl' if name == 'choice' else 'tsv'}"
        path.write_text(text, encoding="utf-8")
        rows, _ = TASKS[name].read([str(path)])
        assert "macro_f1" in [metric.name for metric in TASKS[name].metrics(rows)]


@pytest.mark.parametrize("name", ["pairs", "pos"])
def test_it_is_the_headline_of_evaluation_search_and_comparison(encoder: Path, tmp_path: Path, name: str) -> None:
    data, one, two = tmp_path / "de.tsv", str(tmp_path / "one"), str(tmp_path / "two")
    data.write_text(ROWS[name], encoding="utf-8")
    place = {"base": str(encoder), "task": name, "device": "cpu", "dtype": "float32"}
    train_task(TaskSettings(train=[str(data)], out=one, steps=3, batch_size=2, learning_rate=1e-2, **place))  # type: ignore[arg-type]
    pairs = tmp_path / "de-en.tsv"
    pairs.write_text("rot\tred\nblau\tblue\n", encoding="utf-8")
    train_align(AlignSettings(base=str(encoder), pairs=[str(pairs)], out=two, steps=1, device="cpu", dtype="float32"))
    predictions = tmp_path / "answers.jsonl"
    found = evaluate(
        EvaluateSettings(  # type: ignore[arg-type]
            base=str(encoder), task=name, data=[str(data)], adapter=one, predictions=str(predictions), **COMMON
        )
    )
    rows, _ = TASKS[name].read([str(data)])
    gold, guess = (
        [word for text in texts for word in text.split()] for texts in (map(TASKS[name].answer, rows), found.answers)
    )
    expected = f1_score(gold, guess, average="macro", labels=sorted(set(gold)), zero_division=0)
    assert (found.metric, found.overall.value) == ("macro_f1", pytest.approx(expected))
    compared = compare_systems(
        CompareSettings(systems=[f"one={predictions}"], task=name, data=[str(data)], metric="macro_f1")
    )
    assert (compared.metric, compared.systems[0].groups["all"].value) == ("macro_f1", pytest.approx(expected))
    searched = search(
        SearchSettings(  # type: ignore[arg-type]
            adapters=[one, two],
            base=str(encoder),
            task=name,
            dev=[str(data)],
            grid=[1.0],
            out=str(tmp_path / "s"),
            allow_tested=True,
            **COMMON,
        )
    )
    assert searched.document()["metric"] == "macro_f1"
    assert searched.document()["trials"][0]["value"] == pytest.approx(expected)


def test_macro_f1_of_choices_equals_that_of_scikit_learn(tmp_path: Path) -> None:
    (tmp_path / "de.jsonl").write_text(ROWS["choice"], encoding="utf-8")
    rows, _ = TASKS["choice"].read([str(tmp_path / "de.jsonl")])
    answers = ["1", "1", "blau", "no choice"]
    found = score_answers(TASKS["choice"], rows, answers, {}, seed=0, metric="macro_f1")
    expected = f1_score([1, 2, 2, 3], [1, 1, 2, 0], labels=[1, 2, 3], average="macro", zero_division=0)
    assert (found.metric, found.overall.value) == ("macro_f1", pytest.approx(expected))
