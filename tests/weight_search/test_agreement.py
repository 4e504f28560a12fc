"""`search --objective agreement`: a choice by pairs without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermix import SearchSettings, search, train_align, train_task
from adaptermix.cli import main
from adaptermix.options import AlignSettings, TaskSettings
from adaptermix.tasks import TASKS, ComparableTask, get_task
from adaptermix.tasks.data import Pair
from adaptermix.tasks.tagged import Tagged
from adaptermix.weight_search.candidate_model import CandidateModel
from adaptermix.weight_search.pair_rows import PairRows
from adaptermix.weight_search.significance import TrialScorer
from adaptermix.weight_search.space import Candidate
from adaptermix.weight_search.trial_store import TrialStore
from adaptermix.weight_search.trials import Trial

from ..refusals import refuses

CLASSIFY = get_task("classify")


def pairs_of(*languages: str, count: int) -> list[Pair]:
    return [
        Pair(languages=(code, "en"), source=f"{code} {n}", target=f"en {n}") for code in languages for n in range(count)
    ]


def scorer_of(pairs: PairRows, teacher: list[str], *, floored: bool = True) -> TrialScorer:
    rows = pairs.labelled(teacher)
    metric = pairs.task.agreement(rows)[0]
    languages = [pairs.task.language(row) for row in rows]
    floors = pairs.floors(metric, teacher) if floored else {}
    return TrialScorer(metric, languages, rows, objective="mean", seed=0, floors=floors)


def trial(answers: list[str | None], number: int = 0) -> Trial:
    return Trial(number=number, candidate=Candidate(weights=(1.0, float(number))), answers=tuple(answers))


def test_rows_are_the_source_sides_once_and_the_other_sides() -> None:
    pairs = PairRows.of(CLASSIFY, pairs_of("de", "jv", count=3))
    assert [row.text for row in pairs.rows] == [f"{code} {n}" for code in ("en", "de", "jv") for n in range(3)]
    assert list(pairs.teachers) == [0, 1, 2] * 3
    assert pairs.sources == ("en",)
    assert pairs.aligned == ("de", "jv")
    assert [row.label for row in pairs.labelled(["a", "b", "a", *"ccccc"])] == list("abaabaaba")


def test_a_candidate_is_worth_its_agreement_with_the_task_adapter_on_the_source_side() -> None:
    """By hand: en keeps 3 of 4, de agrees on 2 of 4, jv on 3 of 4."""
    pairs = PairRows.of(CLASSIFY, pairs_of("de", "jv", count=4))
    teacher = ["+", "-", "+", "0", *["-"] * 8]
    answers = [*"+-+-", *"+--+", *"+-00"]
    found = scorer_of(pairs, teacher)
    wanted = 0.0
    for first in (0, 4, 8):
        wanted += sum(answers[first + n] == teacher[n] for n in range(4)) / 4 / 3
    assert wanted == pytest.approx((3 / 4 + 2 / 4 + 3 / 4) / 3)
    assert found.exact(found.counts(trial(answers))) == pytest.approx(wanted, abs=1e-12)
    # a constant answer has at most 2 of 4 on the source side, so 3 of 4 is the least that keeps it
    assert pairs.floors(pairs.task.agreement(pairs.labelled(teacher))[0], teacher) == {"en": 0.75}
    assert found.keeps(trial(answers))


def test_a_task_adapter_that_leaves_some_answers_out_keeps_its_own() -> None:
    """By hand: an empty answer is never right, so its own answers score 2 of 4, and the best constant 1 of 4."""
    pairs = PairRows.of(CLASSIFY, pairs_of("de", count=4))
    teacher = ["+", "-", "", ""]
    found = scorer_of(pairs, teacher)
    assert pairs.floors(pairs.task.agreement(pairs.labelled(teacher))[0], teacher) == {"en": 3 / 8}
    assert found.keeps(trial([*teacher, *"+-+-"]))
    assert found.exact(found.counts(trial([*teacher, *"+-+-"]))) == pytest.approx(0.5)
    assert not found.keeps(trial([*"++++", *"++++"]))
    with refuses("agreement.constant: 4.*en.*''"):
        scorer_of(pairs, [""] * 4)


def test_intervals_of_what_reaches_the_floor_are_those_without_one() -> None:
    """One label is 9 of 10, so the floor is .95; the two wrong rows that intervals add would be below it."""
    pairs = PairRows.of(CLASSIFY, pairs_of("de", count=40))
    teacher = [*"+" * 36, *"-" * 4]
    alone, chosen = trial([*teacher, *"+-" * 20]), trial([*teacher[:-1], "+", *teacher[:36], *"++--"], 1)
    found, plain = (scorer_of(pairs, teacher, floored=floored) for floored in (True, False))
    assert found.keeps(chosen)
    assert found.score(alone) == plain.score(alone)
    assert found.difference(alone, chosen) == plain.difference(alone, chosen)
    assert found.decide([chosen], alone, rule="best") == plain.decide([chosen], alone, rule="best")
    assert found.decide([chosen], alone, rule="best").is_found


def test_a_trial_that_was_stopped_early_is_not_judged_by_a_few_answers() -> None:
    """By hand: one of two rows of en, below the floor of .75, and both of de."""
    pairs = PairRows.of(CLASSIFY, pairs_of("de", count=4))
    found = scorer_of(pairs, ["+", "-", "+", "0"])
    stopped = trial(["+", "+", None, None, "+", "-", None, None])
    assert found.exact(found.counts(stopped)) == pytest.approx((1 / 2 + 1) / 2)
    assert found.keeps(stopped) is None
    whole = trial([*"++++", *"+-+0"])
    assert (found.exact(found.counts(whole)), found.keeps(whole)) == (0, False)


LABELS = st.sampled_from("+-0")


@given(st.lists(LABELS, min_size=2, max_size=30).filter(lambda said: len(set(said)) > 1), LABELS, st.data())
def test_one_answer_to_everything_is_worth_nothing(source: list[str], constant: str, data: st.DataObject) -> None:
    """Both sides of every pair then agree with each other, and with the commonest answer of the task adapter."""
    pairs = PairRows.of(CLASSIFY, pairs_of("de", count=len(source)))
    other = data.draw(st.lists(LABELS, min_size=len(source), max_size=len(source)))
    scorer = scorer_of(pairs, source)
    collapsed, alone = trial([constant] * len(pairs.rows), 1), trial([*source, *other])
    assert not scorer.keeps(collapsed)
    assert scorer.exact(scorer.counts(collapsed)) == 0
    assert scorer.score(collapsed).value == 0
    assert scorer.exact(scorer.counts(alone)) >= 0.5
    verdict = scorer.decide([collapsed, alone], alone, rule="best")
    assert verdict.chosen == 1


def test_the_choice_without_labels_is_that_of_labels() -> None:
    """The task adapter is right on 85 % of the source side, candidates know the other languages differently well."""
    rng = np.random.default_rng(0)
    count, skills = 300, (0.45, 0.6, 0.75, 0.55)
    gold = rng.integers(3, size=count)

    def answered(skill: float) -> list[str]:
        return [str(g if rng.random() < skill else (g + rng.integers(1, 3)) % 3) for g in gold]

    pairs = PairRows.of(CLASSIFY, pairs_of("de", "jv", count=count))
    teacher = answered(0.85)
    scorer = scorer_of(pairs, [*teacher, *[""] * 2 * count])
    rows = [
        row
        for row, label in zip(pairs.rows[count:], [*gold, *gold], strict=True)
        for row in [pairs.task.labelled(row, str(label))]
    ]
    labelled = TrialScorer(
        CLASSIFY.metrics(rows)[0], ["de"] * count + ["jv"] * count, rows, objective="mean", seed=0, first=count
    )
    trials = [trial([*teacher, *answered(skill), *answered(skill)], n) for n, skill in enumerate(skills)]
    by_pairs, by_labels = ([one.exact(one.counts(found)) for found in trials] for one in (scorer, labelled))
    assert np.argsort(by_pairs).tolist() == np.argsort(by_labels).tolist() == [0, 3, 1, 2]
    assert scorer.decide(trials, trials[0], rule="best").chosen == 2
    assert scorer.decide(trials, trials[0], rule="best").is_found


def test_tasks_compare_what_is_alike_in_all_languages() -> None:
    assert {name for name, task in TASKS.items() if isinstance(task, ComparableTask)} == {
        "classify",
        "slots",
        "ner-json",
    }
    for name, english, german, other in (
        ("slots", "time: five am; date: today", "date: heute; time: fünf", "time: fünf; time: heute"),
        (
            "ner-json",
            '[{"TypeName": "LOC", "Text": "Vienna"}, {"TypeName": "PER", "Text": "Ada"}]',
            '[{"TypeName": "PER", "Text": "Ada"}, {"TypeName": "LOC", "Text": "Wien"}]',
            '[{"TypeName": "LOC", "Text": "Wien"}, {"TypeName": "LOC", "Text": "Ada"}]',
        ),
    ):
        task = get_task(name)
        assert isinstance(task, ComparableTask)
        row = task.labelled(task.unlabelled("fünf heute Wien", "de"), english)
        assert task.words(row) == ("fünf", "heute", "Wien")  # type: ignore[attr-defined]
        (metric,) = task.agreement([row])
        assert metric.count(row, german) == (2, 0, 0)
        assert metric.count(row, other) == (1, 1, 1)
        kinds = [(kind, "x") for kind in (("time", "date") if name == "slots" else ("LOC", "PER"))]
        assert metric.count(row, Tagged("x", tags=[], pairs=kinds)) == (2, 0, 0)


def test_what_cannot_be_compared_is_refused() -> None:
    for name in ("nli", "qa", "sft", "translate"):
        with refuses(f"task.not-comparable: '{name}'"):
            PairRows.of(get_task(name), pairs_of("de", count=2))
    turned = [*pairs_of("de", count=2), Pair(languages=("en", "jv"), source="a", target="b")]
    with refuses("agreement.language: en"):
        PairRows.of(CLASSIFY, turned)
    pairs = PairRows.of(CLASSIFY, pairs_of("de", count=3))
    with refuses(r"agreement.constant: 3.*en.*'\+'"):
        scorer_of(pairs, ["+"] * 3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"objective": "agreement"}, "agreement.no-pairs"),
        ({"pairs": ["de-en.tsv"], "dev": ["x"]}, "agreement.pairs-only"),
        ({}, "search.no-dev"),
        ({"dev": ["x"], "pair_rows": ":5"}, "agreement.pair-rows"),
        ({"objective": "agreement", "pairs": ["x"], "rows": ":5"}, "search.rows"),
        (
            {"objective": "agreement", "pairs": ["x"], "dev": ["y"], "race": True},
            "agreement.race-dev",
        ),
    ],
)
def test_settings_that_contradict_each_other(asked: dict[str, Any], message: str) -> None:
    with refuses(message):
        SearchSettings(adapters=["a", "b"], base="m", task="classify", grid=[0.5], out="o", **asked)


@pytest.fixture(scope="module")
def folder(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task LoRA with a head for two words, an alignment LoRA, pairs and labelled rows."""
    into = tmp_path_factory.mktemp("agreement")
    words = {"en": ("good", "bad"), "de": ("gut", "schlecht")}
    for language, (good, bad) in words.items():
        rows = [f"{(good, bad)[n % 2]} {n // 2},{('positive', 'negative')[n % 2]}" for n in range(24)]
        (into / f"rows.{language}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    lines = [f"{words['de'][n % 2]} {n // 2}\t{words['en'][n % 2]} {n // 2}\n" for n in range(24)]
    (into / "de-en.tsv").write_text("".join(lines))
    common: dict[str, Any] = {"base": str(encoder), "device": "cpu", "dtype": "float32", "rank": 4, "dropout": 0.0}
    more = {"task": "classify", "learning_rate": 1e-2, "batch_size": 8, "steps": 40}
    train_task(TaskSettings(**common, **more, train=[str(into / "rows.en.csv")], out=str(into / "task")))
    more = {"pairs": [str(into / "de-en.tsv")], "objective": "contrastive", "batch_size": 8, "learning_rate": 1e-2}
    train_align(AlignSettings(**common, **more, steps=20, out=str(into / "align")))
    return into


def asked(encoder: Path, folder: Path, out: Path, **more: Any) -> SearchSettings:
    common: dict[str, Any] = {
        "adapters": [str(folder / "task"), str(folder / "align")],
        "base": str(encoder),
        "task": "classify",
        "objective": "agreement",
        "pairs": [str(folder / "de-en.tsv")],
        "grid": [0.0, 0.5, 1.0],
        "space": "both",
        "device": "cpu",
        "dtype": "float32",
        "out": str(out),
    }
    return SearchSettings(**common | more)


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def test_pairs_choose_through_the_command_line(
    encoder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [str(folder / "task"), str(folder / "align")]
    files = ["--pairs", str(folder / "de-en.tsv"), "--dev", str(folder / "rows.de.csv"), "--objective", "agreement"]
    how = ["--base", str(encoder), "--task", "classify", "--grid", "0,0.5,1", "--space", "both", "--device", "cpu"]
    run(["search", *adapters, *files, *how, "--report", "--json", "--out", str(tmp_path / "found")])
    document = json.loads(capsys.readouterr().out)
    assert document["objective"] == "agreement"
    assert document["metric"] == "agreement (accuracy)"
    assert list(document["task_alone"]["scores"]) == ["en", "de"]
    assert document["task_alone"]["scores"]["en"]["value"] == 1  # it agrees with itself
    dev = document["dev"]
    assert dev["metric"] == "accuracy"
    assert len(dev["trials"]) == len(document["trials"])
    assert dev["best"]["value"] >= dev["chosen"]["value"]
    place = [found["weights"] for found in document["trials"]].index(document["best"]["weights"])
    assert dev["trials"][place] == dev["chosen"]["value"]
    # the task is learned, so labels and what the task adapter says of the source side are the same
    for found, score in zip(document["trials"], dev["trials"], strict=True):
        assert found["scores"]["de"]["value"] == score
        assert found["keeps_source"] is (found["scores"]["en"]["value"] >= 0.75)
        assert found["value"] == pytest.approx(
            (found["scores"]["en"]["value"] + score) / 2 if found["keeps_source"] else 0.0
        )
    assert document["best"]["value"] == max(found["value"] for found in document["trials"])
    # without the task adapter the head says one thing, or noise
    assert not next(found for found in document["trials"] if found["weights"][0] == 0)["keeps_source"]
    kept = json.loads((tmp_path / "found" / "adaptermix.json").read_text())
    assert [entry["name"] for entry in kept["dev"]] == ["de-en.tsv", "rows.de.csv"]
    assert kept["scores"]["split"] == "pairs"
    assert "its weights chosen on translation pairs without labels" in (tmp_path / "found" / "README.md").read_text()
    page = (tmp_path / "found" / "report.html").read_text()
    assert "Chosen on pairs" in page
    assert "which had no part in the choice" in page


def test_an_interrupted_search_goes_on_with_the_same_pairs_only(encoder: Path, folder: Path, tmp_path: Path) -> None:
    storage = {"storage": str(tmp_path / "trials.log"), "study": "s"}
    first = search(asked(encoder, folder, tmp_path / "one", **storage))
    again = search(asked(encoder, folder, tmp_path / "two", **storage))
    assert [found.seconds for found in again.trials] == [found.seconds for found in first.trials]
    assert again.document()["best"] == first.document()["best"]
    with refuses("study.other-settings: dev_files, pair_rows"):
        search(asked(encoder, folder, tmp_path / "three", **storage, pair_rows=":20"))


@pytest.mark.parametrize("more", [{"race": True}, {"trials": 3, "grid": [], "space": "free"}, {"choose": "one-se"}])
def test_races_samplers_and_rules_choose_by_pairs_too(
    more: dict[str, Any], encoder: Path, folder: Path, tmp_path: Path
) -> None:
    result = search(asked(encoder, folder, tmp_path / "found", **more))
    assert result.chosen_on == "pairs"
    assert result.chosen_score.value >= max(score.value for score in result.scores) - (more.get("choose") == "one-se")
    assert "pairs that chose it" in result.sentence() or "no weight" in result.sentence()


def test_rows_that_were_evaluated_as_test_are_refused(
    encoder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERMIX_STATE", str(tmp_path / "state"))
    arguments = ["evaluate", "--base", str(encoder), "--adapter", str(folder / "task"), "--task", "classify"]
    run([*arguments, "--data", str(folder / "rows.de.csv"), "--split", "test", "--device", "cpu"])
    with refuses("split.tested: dev data must not be test data"):
        search(asked(encoder, folder, tmp_path / "found"))


def test_translations_of_one_sentence_count_as_one(encoder: Path, folder: Path, tmp_path: Path) -> None:
    """They share its label, so four copies of each say as much as one."""
    lines = (folder / "de-en.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "de-en.tsv").write_text("".join(lines * 4))
    grid: dict[str, Any] = {"grid": [0.5]}
    once = search(asked(encoder, folder, tmp_path / "one", **grid))
    often = search(asked(encoder, folder, tmp_path / "two", pairs=[str(tmp_path / "de-en.tsv")], **grid))
    for own, other in ((once.baseline_languages, often.baseline_languages), (once.languages[0], often.languages[0])):
        assert other["de"].n == 4 * own["de"].n
        assert (other["de"].low, other["de"].high) == pytest.approx((own["de"].low, own["de"].high), abs=1e-9)
    assert often.verdict.difference.low == pytest.approx(once.verdict.difference.low, abs=1e-9)


def test_processes_that_share_trials_score_against_the_same_answers(
    encoder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that begin at once both ask the task adapter alone; the second, whose answers differ, takes the first's."""
    storage = {"storage": str(tmp_path / "trials.log"), "study": "s", "grid": [0.5, 1.0]}
    first = search(asked(encoder, folder, tmp_path / "one", **storage))
    kept, looks = TrialStore.saved_answers, iter([None])
    monkeypatch.setattr(TrialStore, "_check", lambda _self: None)  # which looks too
    monkeypatch.setattr(TrialStore, "saved_answers", lambda self, *name: next(looks, kept(self, *name)))
    rows = 48
    monkeypatch.setattr(CandidateModel, "alone", lambda _self, _label: ["positive", *["negative"] * (rows - 1)])
    second = search(asked(encoder, folder, tmp_path / "two", **storage))
    assert second.document()["task_alone"] == first.document()["task_alone"]
    assert second.document()["best"] == first.document()["best"]


def test_dev_rows_are_scored_by_the_metric_that_is_asked_for(encoder: Path, folder: Path, tmp_path: Path) -> None:
    dev = {"dev": [str(folder / "rows.de.csv")], "metric": "macro_f1"}
    found = search(asked(encoder, folder, tmp_path / "found", **dev)).document()
    assert (found["metric"], found["dev"]["metric"]) == ("agreement (macro_f1)", "macro_f1")


def test_a_dry_run_names_the_rows_and_the_control(
    encoder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--base", str(encoder), "--task", "classify", "--grid", "0.5,1", "--objective", "agreement", "--dry-run"]
    arguments = ["search", str(folder / "task"), str(folder / "align"), *how, "--pairs", str(folder / "de-en.tsv")]
    run([*arguments, "--control", "2", "--out", str(tmp_path / "found")])
    said = capsys.readouterr().err
    assert "would try 2 candidates on 48 rows" in said
    assert "where a gain is found, random adapters instead of the others would be tried on the same rows" in said
    assert "2 draws" in said


def test_a_search_that_was_refused_for_its_pairs_is_not_in_the_way(encoder: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.de-en.tsv").write_text("gut 1\tgood 1\n")
    with refuses("agreement.too-few: en"):
        search(asked(encoder, folder, tmp_path / "found", pairs=[str(tmp_path / "one.de-en.tsv")]))
    assert search(asked(encoder, folder, tmp_path / "found")).chosen_on == "pairs"
