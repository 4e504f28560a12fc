"""Labels in answers, and macro F1 against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import get_task, get_template
from adaptermix.tasks.classify import ClassifyRow
from adaptermix.tasks.labels import label_metrics, label_reader, macro_f1

from ..scoring import count

CLASSIFY = get_task("classify")


def row(label: str, language: str = "en") -> ClassifyRow:
    return ClassifyRow(text="a", label=label, language=language)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", "positive"),
        (" Positive.\nText: more", "positive"),
        ('"NEGATIVE"!', "negative"),
        ("**neutral**", "neutral"),
        ("\n\nneutral", "neutral"),
        ("positive negative", None),
        ("not positive", None),
        ("positiv", None),
        ("label: positive", None),
        ("", None),
        ("...", None),
    ],
)
def test_one_label_is_read_from_the_first_line(answer: str, label: str | None) -> None:
    assert label_reader(["positive", "negative", "neutral"])(answer) == label


def test_labels_that_differ_in_case_or_stops_only_are_kept_apart() -> None:
    read = label_reader(["May", "may", "C", "C++", ":)", ":(", "!"])
    assert [read(text) for text in ("May", "may", "MAY", "c", "c++", ":)", ":(", "!", "?")] == [
        *("May", "may", None, "C", "C++", ":)", ":(", "!", None)
    ]


lines = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(
    lambda text: text == text.strip() and len(text.splitlines()) == 1
)


@given(st.lists(lines, min_size=1, max_size=5, unique=True))
def test_every_label_is_read_back(labels: list[str]) -> None:
    read = label_reader(labels)
    assert [read(CLASSIFY.answer(row(label))) for label in labels] == labels


names = st.sampled_from(["a", "b", "c", "d"])
answered = st.lists(st.tuples(names, names | st.just("nothing")), min_size=1, max_size=12)


@given(answered)
def test_scores_equal_those_of_scikit_learn(rows: list[tuple[str, str]]) -> None:
    gold, guess = [label for label, _ in rows], [answer for _, answer in rows]
    evaluation = score_answers(CLASSIFY, [row(label) for label in gold], guess, {}, seed=0)
    assert evaluation.metric == "accuracy"
    assert evaluation.scores["en"].value == pytest.approx(accuracy_score(gold, guess))
    expected = f1_score(gold, guess, average="macro", labels=sorted(set(gold)), zero_division=0)
    assert evaluation.others["macro_f1"]["en"].value == pytest.approx(expected)


@given(answered, answered)
def test_each_language_has_the_labels_of_its_own_gold_rows(
    one: list[tuple[str, str]], two: list[tuple[str, str]]
) -> None:
    rows = [row(label, "de") for label, _ in one] + [row(label, "fr") for label, _ in two]
    evaluation = score_answers(CLASSIFY, rows, [answer for _, answer in one + two], {}, seed=0)
    for language, pairs in (("de", one), ("fr", two)):
        gold, guess = [label for label, _ in pairs], [answer for _, answer in pairs]
        expected = f1_score(gold, guess, average="macro", labels=sorted(set(gold)), zero_division=0)
        assert evaluation.others["macro_f1"][language].value == pytest.approx(expected)


@given(st.lists(answered, min_size=2, max_size=4))
def test_macro_f1_takes_many_sums_at_once(samples: list[list[tuple[str, str]]]) -> None:
    labels = ["a", "b", "c", "d"]
    metric = label_metrics(labels, label_reader(labels))[1]
    sums = np.array([np.sum([metric.count(row(gold), answer) for gold, answer in rows], axis=0) for rows in samples])
    assert sums.shape == (len(samples), 12)
    np.testing.assert_array_equal(macro_f1(sums), [macro_f1(each) for each in sums])
    np.testing.assert_array_equal(macro_f1(sums[None]), macro_f1(sums)[None])


def test_a_case_by_hand() -> None:
    """Of a one in two is hit, of b none: b's only answer is spurious for a. F1 of a is 2 / (2 + 1 + 1)."""
    rows, answers = [row("a"), row("a"), row("b")], ["a", "nothing", "a"]
    evaluation = score_answers(CLASSIFY, rows, answers, {}, seed=0)
    assert evaluation.others["macro_f1"]["en"].value == pytest.approx((0.5 + 0) / 2)
    assert evaluation.scores["en"].value == pytest.approx(1 / 3)


def test_an_answer_without_a_label_is_missed_and_spurious_for_none() -> None:
    metrics = CLASSIFY.metrics([row("a"), row("b")])
    assert [list(metric.count(row("b"), "c") or ()) for metric in metrics] == [[0, 1], [0, 0, 0, 0, 0, 1]]
    assert [list(metric.count(row("b"), "A") or ()) for metric in metrics] == [[0, 1], [0, 1, 0, 0, 0, 1]]
    assert count(CLASSIFY, row("b"), "B.") == {"accuracy": (1, 1), "macro_f1": [1, 0, 0]}


def test_no_rows_have_metrics_too() -> None:
    accuracy, macro = CLASSIFY.metrics([])
    assert (accuracy.name, macro.name) == ("accuracy", "macro_f1")
    assert macro.value(np.zeros((2, 0))).tolist() == [0, 0]


def test_the_templates_say_what_is_asked() -> None:
    fields = CLASSIFY.fields(ClassifyRow(text="{rot}", label="x", language="de"))
    plain = get_template(CLASSIFY)
    assert (plain.name, plain.render(fields, None), plain.lead) == ("plain", "Text: {rot}\nLabel:", " ")
    chat = get_template(CLASSIFY, "chat")
    assert (chat.chat, chat.prompt.format_map(fields), chat.lead) == (True, "{rot}", "")
    assert CLASSIFY.one_line
