"""Entities as JSON: what is written is read back, what is broken is read as far as it goes, and both scores."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

from adaptermix.tasks import get_task, get_template
from adaptermix.tasks.ner_json import NerRow, count_entities, format_entities, parse_entities

from ..scoring import count, micro_f1

NER = get_task("ner-json")
ADA, BATH = ("PER", "Ada"), ("LOC", "Bath")
ANSWER = format_entities([ADA, BATH])

anything = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
odd = st.text('"\\{}[],: \n\u2028TypeNameTextu', min_size=1, max_size=12)
words = (anything | odd).filter(str.strip)
entity_lists = st.lists(st.tuples(words, words), max_size=4)


@given(entity_lists)
def test_answers_are_read_back(entities: list[tuple[str, str]]) -> None:
    answer = format_entities(entities)
    assert parse_entities(answer) == entities
    assert "\n" not in answer


@given(entity_lists.filter(bool))
def test_answers_that_are_not_json_as_a_whole_are_read_back_too(entities: list[tuple[str, str]]) -> None:
    """A first bracket that opens nothing makes way for the pairs."""
    assert parse_entities("[see] " + format_entities(entities)) == entities


@given(entity_lists)
def test_other_layouts_of_json_are_read(entities: list[tuple[str, str]]) -> None:
    swapped = json.dumps([{"Text": value, "TypeName": kind} for kind, value in entities], indent=2)
    assert parse_entities(f"```json\n{swapped}\n```\nThese are all.") == entities


@given(st.text(st.characters(codec="utf-8")) | st.text('"{}[],:\\TypeNamxt '))
def test_no_answer_is_too_odd(answer: str) -> None:
    assert isinstance(parse_entities(answer), list)


@pytest.mark.parametrize(
    ("answer", "entities"),
    [
        ("[]", []),
        ("", []),
        ("None", []),
        ("[] The text names nobody.", []),
        ("[]\nText: more\nEntities: " + ANSWER, []),
        (ANSWER + ", and more", [ADA, BATH]),
        (ANSWER[:-4], [ADA]),
        ('{"TypeName": "PER", "Text": "Ada"}', [ADA]),
        ('{"entities": ' + ANSWER + "}", [ADA, BATH]),
        ('[{"TypeName": "PER", "Start": 3, "Text": "Ada"}]', [ADA]),
        ('[{"TypeName" :"PER" , "Text":  "Ada"}, {"Text": "Bath", "TypeName": "LOC"}', [ADA, BATH]),
        ('[{"TypeName": "PER"}, {"TypeName": "LOC", "Text": "Bath"}]', [BATH]),
        ('[{"TypeName": "PER", "Text": 5}, {"TypeName": "", "Text": "x"}, {"TypeName": "X", "Text": " "}]', []),
        ('[{"TypeName": null, "Text": "x"}, 3, "a"]', []),
        ('so: "TypeName": "PER", "Text": "\\u0041da"', [ADA]),
        ('so: "TypeName": "PER", "Text": "\\x"', [("PER", "\\x")]),
        ('[{"TypeName": "PER", "Text": "a\nb"}]', [("PER", "a\nb")]),
        ("[" * 100_000, []),
        ("{'TypeName': 'PER'}", []),
    ],
)
def test_answers_are_read_as_far_as_they_go(answer: str, entities: list[tuple[str, str]]) -> None:
    assert parse_entities(answer) == entities


def test_bags_are_compared_and_blanks_count_once() -> None:
    gold = [("PER", "Ada  Lovelace"), ("PER", "Ada Lovelace"), BATH]
    assert count_entities(gold, [("PER", "Ada\nLovelace"), ("LOC", "Bath"), BATH]) == (2, 1, 1)
    assert count_entities(gold, [("PER", "ada lovelace"), ("ORG", "Bath")]) == (0, 2, 3)
    assert count_entities([], []) == (0, 0, 0)


def ner_row(tokens: list[str], tags: list[str]) -> NerRow:
    return NerRow(text=" ".join(tokens), entities=(), language="en", tokens=tuple(tokens), tags=tuple(tags))


def test_rows_without_tokens_have_no_span_score() -> None:
    bare = NerRow(text="Ada", entities=(ADA,), language="en")
    assert count(NER, bare, format_entities([ADA])) == {"tuple_f1": (1, 0, 0)}
    spanned = NerRow(text="Ada", entities=(ADA,), language="en", tokens=("Ada",), tags=("B-PER",))
    assert count(NER, spanned, format_entities([ADA])) == {"tuple_f1": (1, 0, 0), "entity_f1": (1, 0, 0)}
    metrics = NER.metrics([bare, spanned])
    assert [metric.name for metric in metrics] == ["tuple_f1", "entity_f1"]
    assert metrics[1].count(bare, "[]") is None


def test_entities_that_do_not_occur_cost_a_tuple_but_no_span() -> None:
    row = NerRow(text="Ada", entities=(ADA,), language="en", tokens=("Ada",), tags=("B-PER",))
    assert count(NER, row, ANSWER) == {"tuple_f1": (1, 1, 0), "entity_f1": (1, 0, 0)}


def _by_hand(tokens: list[str], entities: list[tuple[str, str]]) -> list[str]:
    """For each entity the first window of as many tokens, none of them taken."""
    tags = ["O"] * len(tokens)
    for kind, value in entities:
        phrase = value.split()
        for start in range(len(tokens) - len(phrase) + 1):
            stop = start + len(phrase)
            if tokens[start:stop] == phrase and set(tags[start:stop]) == {"O"}:
                tags[start:stop] = [f"B-{kind}", *[f"I-{kind}"] * (len(phrase) - 1)]
                break
    return tags


tokens_of = st.lists(st.sampled_from(["ann", "lee", "rome"]), min_size=1, max_size=7)
kinds = st.sampled_from(["PER", "LOC"])
phrases = st.lists(st.sampled_from(["ann", "lee", "rome", "oslo"]), min_size=1, max_size=2).map(" ".join)
tag = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
answered = tokens_of.flatmap(
    lambda tokens: st.tuples(
        st.just(tokens),
        st.lists(tag, min_size=len(tokens), max_size=len(tokens)),
        st.lists(st.tuples(kinds, phrases), max_size=4),
    )
)


@given(st.lists(answered, min_size=1, max_size=4))
def test_span_f1_of_generated_answers_equals_strict_seqeval(
    rows: list[tuple[list[str], list[str], list[tuple[str, str]]]],
) -> None:
    counts = [
        count(NER, ner_row(tokens, tags), format_entities(entities))["entity_f1"] for tokens, tags, entities in rows
    ]
    if not any(map(sum, counts)):
        assert micro_f1(counts).value == 1.0  # seqeval has no score where there is nothing
        return
    gold, guess = [tags for _, tags, _ in rows], [_by_hand(tokens, entities) for tokens, _, entities in rows]
    expected = f1_score(gold, guess, mode="strict", scheme=IOB2, zero_division=0)
    assert micro_f1(counts).value == pytest.approx(expected)


def test_the_templates_say_what_is_asked() -> None:
    row = NerRow(text="{Ada}", entities=(ADA, BATH), language="en")
    assert NER.answer(row) == '[{"TypeName": "PER", "Text": "Ada"}, {"TypeName": "LOC", "Text": "Bath"}]'
    assert NER.answer(NerRow(text="a", entities=(), language="zh")) == "[]"
    assert NER.answer(NerRow(text="a", entities=(("LOC", "北京"),), language="zh")).endswith('"北京"}]')
    plain = get_template(NER)
    assert plain.render(NER.fields(row), None) + plain.lead == "Text: {Ada}\nEntities: "
    chat = get_template(NER, "mid-align")
    assert (chat.chat, chat.prompt) == (True, "{text}")
    assert chat.system is not None
    assert all(word in chat.system for word in ("person", "organization", "location", "JSON", "TypeName", "Text"))
    assert chat.system.format_map(NER.fields(row)) == chat.system
