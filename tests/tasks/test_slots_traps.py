"""What published scorers got wrong or leave open, case by case, and slot answers made of any text."""

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


def _plain(text: str) -> bool:
    """Free of the separators and of line ends, at the edges too, where the format adds its own blanks."""
    inside = f" {text} "
    return (
        bool(text)
        and text == text.strip()
        and len(text.splitlines()) == 1
        and not {": ", "; "} & {inside[i : i + 2] for i in range(len(inside) - 1)}
    )


anything = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(_plain)
odd = st.text(":;, aBé日", min_size=1, max_size=6).filter(_plain)


@given(st.lists(st.tuples(anything | odd, anything | odd), min_size=1, max_size=4))
def test_any_slots_without_separators_are_read_back(slots: list[tuple[str, str]]) -> None:
    assert parse_slots(format_slots(slots)) == slots


def test_no_slots_are_written_and_read_as_none() -> None:
    assert format_slots([]) == "None"
    assert parse_slots(format_slots([])) == []


@pytest.mark.parametrize("answer", ["None", "none", "NONE", " nOnE \n", "None\ntime: five", "", " ", "\n"])
def test_none_in_any_case_is_no_slot(answer: str) -> None:
    assert parse_slots(answer) == []


@pytest.mark.parametrize(
    ("answer", "slots"),
    [
        ("\n\ntime: five\ndate: today", [("time", "five")]),
        ("None; time: five", [("time", "five")]),
        ("time: five;date: today", []),
        ("time: five; ; date: today", [("time", "five"), ("date", "today")]),
        (": five; time: ; x: y", [("x", "y")]),
        ("time: none", [("time", "none")]),
        ("time: 10:30", [("time", "10:30")]),
        ("a: b; a: b", [("a", "b"), ("a", "b")]),
        ("  time :  five  ", [("time", "five")]),
    ],
)
def test_parts_split_into_exactly_two_or_are_dropped(answer: str, slots: list[tuple[str, str]]) -> None:
    assert parse_slots(answer) == slots


@pytest.mark.parametrize(
    ("tokens", "slots", "tags"),
    [
        (["a", "b", "a"], [("x", "A")], ["x", "O", "x"]),
        (["a", "b", "a"], [("x", "a b"), ("y", "b a")], ["x", "y", "y"]),
        (["a", "b", "c"], [("y", "b"), ("x", "a b c")], ["x", "x", "x"]),
        (["a", "b"], [("x", "ab"), ("y", "a c"), ("z", "a b c")], ["O", "O"]),
        (["a", "a", "a"], [("x", "a a")], ["x", "x", "x"]),
        (["ab"], [("x", "a")], ["O"]),
        ([], [("x", "a")], []),
    ],
    ids=[
        "every occurrence",
        "later overwrites",
        "longer overwrites",
        "unknown phrases",
        "overlap",
        "part",
        "no tokens",
    ],
)
def test_tokens_are_tagged_as_by_the_scorer_of_massive(
    tokens: list[str], slots: list[tuple[str, str]], tags: list[str]
) -> None:
    assert tag_tokens(tokens, slots, "en") == tags


def test_japanese_and_chinese_values_are_found_by_character() -> None:
    assert tag_tokens(["朝", "5", "時", "に"], [("time", "5時")], "ja") == ["O", "time", "time", "O"]
    assert tag_tokens(["放", "Jazz", "乐"], [("genre", "jazz")], "zh") == ["O", "genre", "O"]
    assert tag_tokens(["朝5時に"], [("time", "5時")], "de") == ["O"]


def test_phrases_that_do_not_occur_cost_a_pair_but_no_span() -> None:
    row = SlotRow(text="a b", slots=(("x", "a"),), language="en", tokens=("a", "b"), tags=("x", "O"))
    assert count(get_task("slots"), row, "x: a; y: gone") == {
        "pair_f1": (1, 1, 0),
        "type_f1": (1, 1, 0),
        "span_f1": (1, 0, 0),
    }


def test_labels_that_the_gold_never_uses_count_as_spurious() -> None:
    row = SlotRow(text="a b", slots=(("x", "a"),), language="en", tokens=("a", "b"), tags=("x", "O"))
    assert count(get_task("slots"), row, format_slots([("never-seen", "b")]))["span_f1"] == (0, 1, 1)


def test_equal_neighbours_merge_on_both_sides() -> None:
    row = SlotRow(text="a b", slots=(("x", "a"), ("x", "b")), language="en", tokens=("a", "b"), tags=("x", "x"))
    for slots in ([("x", "a"), ("x", "b")], [("x", "a b")]):
        assert count(get_task("slots"), row, format_slots(slots))["span_f1"] == (1, 0, 0)
    assert count_pairs(row.slots, [("x", "a b")]) == (0, 1, 2)


def _bio(tags: list[str]) -> list[str]:
    return ["O" if tag == "O" else ("I-" if i and tags[i - 1] == tag else "B-") + tag for i, tag in enumerate(tags)]


def _by_hand(tokens: list[str], slots: list[tuple[str, str]]) -> list[str]:
    """Section 1.6 of the notes on methods, literally: for each part in turn, tag wherever it begins."""
    tags = ["O"] * len(tokens)
    for kind, value in slots:
        words = value.lower().split(" ")
        for begin in range(len(tokens)):
            window = [token.lower() for token in tokens[begin : begin + len(words)]]
            if window == words:
                for place in range(begin, begin + len(words)):
                    tags[place] = kind
    return tags


words = st.sampled_from(["a", "B", "b", "c"])
phrases = st.lists(words, min_size=1, max_size=2).map(" ".join)
commands = st.lists(words, min_size=1, max_size=7)
labelled = commands.flatmap(
    lambda tokens: st.tuples(
        st.just(tokens),
        st.lists(st.sampled_from("Oxyz"), min_size=len(tokens), max_size=len(tokens)),
        st.lists(st.tuples(st.sampled_from("xyzw"), phrases), max_size=3),
    )
)


@given(st.lists(labelled, min_size=1, max_size=5))
def test_span_f1_of_generated_answers_equals_seqeval(
    rows: list[tuple[list[str], list[str], list[tuple[str, str]]]],
) -> None:
    task = get_task("slots")
    counts, gold, guess = [], [], []
    for tokens, tags, slots in rows:
        row = SlotRow(text=" ".join(tokens), slots=(), language="en", tokens=tuple(tokens), tags=tuple(tags))
        counts.append(count(task, row, format_slots(slots))["span_f1"])
        gold.append(_bio(tags))
        guess.append(_bio(_by_hand(tokens, slots)))
    if any(map(sum, counts)):
        assert micro_f1(counts).value == pytest.approx(f1_score(gold, guess, zero_division=0))
    else:
        assert micro_f1(counts).value == 1.0  # seqeval has no score where there is nothing


@given(st.lists(st.sampled_from("Oxy"), max_size=8))
def test_spans_cover_the_tagged_tokens_once(tags: list[str]) -> None:
    covered = [place for _, start, stop in spans(tags) for place in range(start, stop)]
    assert sorted(covered) == [place for place, tag in enumerate(tags) if tag != "O"]
