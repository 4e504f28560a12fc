"""Scores follow the script that a paper used, and any metric of a task can be the one that counts."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path

import pytest

from adaptermix import CompareSettings
from adaptermix.evaluation.compare import compare_systems
from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import get_task, metrics_of
from adaptermix.tasks.qa import QaRow
from adaptermix.tasks.slots import SlotRow
from adaptermix.tasks.tagged import Tagged, iob2_spans

from ..refusals import refuses


def squad(prediction: str, truth: str) -> tuple[float, float]:
    """F1 and exact match as SQuAD's evaluate-v1.1.py defines them, written from its description."""

    def normal(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()

    guess, gold = normal(prediction), normal(truth)
    same = sum((Counter(guess) & Counter(gold)).values())
    f1 = 2 * same / (len(guess) + len(gold)) if same else float(guess == gold)
    return f1, float(guess == gold)


ANSWERS = [
    ("zh", "2008年8月", "2008年"),
    ("zh", "北京", "北京市"),
    ("de", "das alte Haus", "alte Haus"),
    ("es", "la «casa»", "casa"),
    ("en", "The house!", "house"),
    ("tr", "evin adresi", "adresi"),
]


@pytest.mark.parametrize(("language", "gold", "answer"), ANSWERS)
def test_squad_is_squads_script_in_every_language(language, gold, answer):
    row = QaRow(question="?", context=gold, answers=(gold,), language=language)
    f1, exact = metrics_of(get_task("qa"), [row], scorer="squad")
    assert (f1.count(row, answer)[0], exact.count(row, answer)[0]) == pytest.approx(squad(answer, gold))


def test_the_scripts_differ_where_they_should():
    row = QaRow(question="?", context="北京", answers=("北京",), language="zh")
    by_script = {
        scorer: metrics_of(get_task("qa"), [row], scorer=scorer)[0].count(row, "北京市")[0]
        for scorer in ("mlqa", "squad")
    }
    # by characters two of three and two of two; by blanks two words that differ
    assert by_script == {"mlqa": pytest.approx(0.8), "squad": 0.0}
    assert metrics_of(get_task("qa"), [row])[0].count(row, "北京市")[0] == pytest.approx(0.8)


def test_strict_spans_are_those_of_seqeval():
    pytest.importorskip("seqeval")
    from seqeval.scheme import IOB2, Entities

    cases = [
        ["B-x", "I-x", "B-x", "O", "I-x"],
        ["B-x", "I-y", "B-y", "I-y"],
        ["I-x", "I-x", "B-z"],
        ["O", "B-x", "B-x", "B-x"],
        ["B-x", "O", "I-x"],
    ]
    for tags in cases:
        entities = Entities([tags], IOB2).entities[0]
        assert set(iob2_spans(tags)) == {(entity.tag, entity.start, entity.end) for entity in entities}


def test_equal_neighbours_are_two_spans_only_if_strict():
    row = SlotRow(
        text="a b c",
        slots=(("x", "a"), ("x", "b")),
        language="en",
        tokens=("a", "b", "c"),
        tags=("x", "x", "O"),
        starts=(0, 1),
    )
    joined = Tagged("x: a b", tags=("B-x", "I-x", "O"), pairs=(("x", "a b"),))
    right = Tagged("x: a; x: b", tags=("B-x", "B-x", "O"), pairs=(("x", "a"), ("x", "b")))
    slots = get_task("slots")
    counted = {
        (scorer, answer): metrics_of(slots, [row], metric="span_f1", scorer=scorer)[0].count(row, answer)
        for scorer in ("merged", "strict")
        for answer in (joined, right, "x: a; x: b")
    }
    assert counted["merged", joined] == counted["merged", right] == (1, 0, 0)
    assert counted["strict", joined] == (0, 1, 2)
    assert counted["strict", right] == counted["strict", "x: a; x: b"] == (2, 0, 0)


def test_an_unknown_metric_or_scorer_is_named_with_those_there_are():
    with refuses("task.metric: accuracy, macro_f1"):
        metrics_of(get_task("nli"), [], metric="f1")
    with refuses("task.scorer: one of mlqa, squad.*qa"):
        metrics_of(get_task("qa"), [], scorer="strict")
    with refuses("task.scorer: left out.*nli"):
        metrics_of(get_task("nli"), [], scorer="squad")


def test_a_named_metric_must_be_able_to_score_every_language():
    task = get_task("slots")
    rows = [
        SlotRow(text="at five", slots=(("time", "five"),), language="en", tokens=("at", "five"), tags=("O", "time")),
        SlotRow(text="um fünf", slots=(("time", "fünf"),), language="de"),
    ]
    # the mean over languages would be 1.0, of English alone
    with refuses("task.metric-language: span_f1.*de"):
        score_answers(task, rows, ["time: five", "None"], {}, seed=0, metric="span_f1")
    assert score_answers(task, rows, ["time: five", "None"], {}, seed=0, metric="pair_f1").overall.value == 0.5
    assert score_answers(task, rows[:1], ["time: five"], {}, seed=0, metric="span_f1").overall.value == 1.0


def test_systems_are_compared_by_the_metric_that_is_named(tmp_path: Path):
    """Three labels, one rare: always the common one has accuracy .8, and macro F1 .8889 / 3."""
    rows = [{"text": f"t{n}", "label": "a" if n < 8 else "bc"[n - 8]} for n in range(10)]
    data = tmp_path / "en.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"answer": "a"}) + "\n" for _ in rows))
    common = {"systems": [f"s={answers}"], "task": "classify", "data": [str(data)]}
    assert compare_systems(CompareSettings(**common)).systems[0].runs == [0.8]
    by_label = compare_systems(CompareSettings(**common, metric="macro_f1"))
    assert by_label.metric == "macro_f1"
    assert by_label.systems[0].runs == [pytest.approx(2 * 8 / 18 / 3)]


def test_an_evaluation_says_which_metric_and_script_count():
    row = QaRow(question="?", context="北京", answers=("北京",), language="zh")
    found = score_answers(get_task("qa"), [row], ["北京市"], {}, seed=0, metric="exact_match", scorer="squad")
    document = found.document()
    assert (document["metric"], document["scorer"]) == ("exact_match", "squad")
    assert document["scores"]["zh"]["value"] == 0.0
    assert set(document["metrics"]) == {"exact_match", "f1"}
