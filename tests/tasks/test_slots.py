"""Slot answers, and both ways of counting them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score

from adaptermix.tasks import get_task
from adaptermix.tasks.slots import SlotRow, count_pairs, format_slots, iob2_of, merged_spans, parse_slots

from ..scoring import count, micro_f1


def tag_tokens(tokens: Sequence[str], slots: Sequence[tuple[str, str]], language: str) -> list[str]:
    return [tag if tag == "O" else tag[2:] for tag in iob2_of(tokens, slots, language)]


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    return set(merged_spans([tag if tag == "O" else f"B-{tag}" for tag in tags]))


words = st.text(alphabet="abcdefg ", min_size=1).map(str.strip).filter(bool)


@given(st.lists(st.tuples(words, words), max_size=4))
def test_answers_are_read_back(slots: list[tuple[str, str]]) -> None:
    assert parse_slots(format_slots(slots)) == slots or not slots


@pytest.mark.parametrize(
    ("answer", "slots"),
    [
        ("None", []),
        ("none", []),
        ("", []),
        ("time: five\nmore: text", [("time", "five")]),
        ("time: five; broken; date: today", [("time", "five"), ("date", "today")]),
        ("time: a: b", []),
        ("time:five", []),
    ],
)
def test_malformed_parts_are_dropped(answer: str, slots: list[tuple[str, str]]) -> None:
    assert parse_slots(answer) == slots


def test_pairs_are_counted_as_bags_without_regard_to_case() -> None:
    gold = [("city", "Rome"), ("city", "Rome"), ("date", "today")]
    assert count_pairs(gold, [("city", "rome"), ("date", "now"), ("city", "ROME")]) == (2, 1, 1)


def test_every_occurrence_is_tagged_and_later_slots_overwrite() -> None:
    tokens = ["call", "Ann", "and", "ann", "smith"]
    tags = tag_tokens(tokens, [("person", "ann"), ("name", "Ann Smith"), ("city", "Rome")], "en")
    assert tags == ["O", "person", "O", "name", "name"]


def test_equal_neighbours_are_one_span() -> None:
    assert spans(["x", "x", "O", "y", "x"]) == {("x", 0, 2), ("y", 3, 4), ("x", 4, 5)}


def _bio(tags: list[str]) -> list[str]:
    return ["O" if tag == "O" else ("I-" if i and tags[i - 1] == tag else "B-") + tag for i, tag in enumerate(tags)]


@given(st.lists(st.lists(st.tuples(*[st.sampled_from("Oxyz")] * 2), min_size=1, max_size=8), min_size=1, max_size=5))
def test_span_f1_equals_seqeval(rows: list[list[tuple[str, str]]]) -> None:
    gold = [[pair[0] for pair in row] for row in rows]
    guess = [[pair[1] for pair in row] for row in rows]
    counts = []
    for one, two in zip(gold, guess, strict=True):
        hit = len(spans(one) & spans(two))
        counts.append((hit, len(spans(two)) - hit, len(spans(one)) - hit))
    if not any(sum(count) for count in counts):
        return  # seqeval warns and gives 0 where there is nothing at all
    expected = f1_score([_bio(row) for row in gold], [_bio(row) for row in guess], zero_division=0)
    assert micro_f1(counts).value == pytest.approx(expected)


def test_rows_without_tokens_have_no_span_score() -> None:
    task = get_task("slots")
    row = SlotRow(text="morgen", slots=(("date", "tomorrow"),), language="de")
    assert count(task, row, "date: tomorrow") == {"pair_f1": (1, 0, 0), "type_f1": (1, 0, 0)}
    # understood, and answered in another language
    assert count(task, row, "date: morgen") == {"pair_f1": (0, 1, 1), "type_f1": (1, 0, 0)}
    spanned = SlotRow(text="morgen", slots=(("date", "morgen"),), language="de", tokens=("morgen",), tags=("date",))
    assert count(task, spanned, "date: morgen")["span_f1"] == (1, 0, 0)
