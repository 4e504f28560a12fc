"""Relations in answers and their scores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import get_task, get_template
from adaptermix.tasks.nli import LABELS, NliRow

from ..scoring import count

NLI = get_task("nli")


def row(label: str) -> NliRow:
    return NliRow(premise="a {b}", hypothesis="c", label=label, language="en")


@pytest.mark.parametrize("label", LABELS)
def test_the_relation_is_taught_and_read_back(label: str) -> None:
    assert NLI.answer(row(label)) == label
    assert count(NLI, row(label), f" {label.title()}.\n")["accuracy"] == (1, 1)


@pytest.mark.parametrize(("answer", "right"), [("contradictory", 1), ("contradiction", 1), ("contra", 0), ("2", 0)])
def test_contradictory_is_a_spelling_and_a_number_is_not(answer: str, right: int) -> None:
    assert count(NLI, row("contradiction"), answer)["accuracy"] == (right, 1)


@given(
    st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, "so"])), min_size=1, max_size=9),
)
def test_macro_f1_equals_that_of_scikit_learn(rows: list[tuple[str, str]]) -> None:
    gold, guess = [label for label, _ in rows], [answer for _, answer in rows]
    evaluation = score_answers(NLI, [row(label) for label in gold], guess, {}, seed=0)
    expected = f1_score(gold, guess, average="macro", labels=sorted(set(gold)), zero_division=0)
    assert evaluation.metric == "accuracy"
    assert evaluation.others["macro_f1"]["en"].value == pytest.approx(expected)


def test_the_templates_say_what_is_asked() -> None:
    fields = NLI.fields(row("neutral"))
    plain = get_template(NLI)
    assert plain.render(fields, None) + plain.lead == "Premise: a {b}\nHypothesis: c\nRelation: "
    chat = get_template(NLI, "chat")
    assert (chat.chat, chat.prompt.format_map(fields)) == (True, "Premise: a {b}\nHypothesis: c")
    assert chat.system is not None
    assert all(label in chat.system for label in LABELS)
    assert NLI.one_line
    assert NLI.language(row("neutral")) == "en"
