"""Prompts with answers, and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.tasks import get_task

from ...refusals import refuses
from .test_readers import PACKINGS, pack

read_sft = get_task("sft").read


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROW = {"prompt": "ask", "answer": "tell"}
MESSAGES = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": " ask "},
    {"role": "assistant", "content": "tell\nmore\n"},
]


@PACKINGS
def test_rows_are_the_same_in_every_packing(tmp_path: Path, packing: str) -> None:
    path = pack(tmp_path / "de.jsonl", f"{json.dumps(ROW)}\n\n{json.dumps({'messages': MESSAGES})}\n", packing)
    rows, files = read_sft([path])
    assert [row.turns for row in rows] == [(("user", "ask"),), (("system", "be"), ("user", "ask"))]
    assert [row.answer for row in rows] == ["tell", "tell\nmore"]
    assert {row.language for row in rows} == {"de"}
    assert files[0].language == "de"


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"instruction": "a", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\n\nc", "b"),
        ({"instruction": "a", "input": " ", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": None, "output": "b"}, "a", "b"),
        ({"input": "a", "output": "b"}, "a", "b"),
        ({"question": "a", "answer": "b"}, "a", "b"),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": "a", "response": "b", "more": [1]}, "a", "b"),
        ({"prompt": "a", "answer": 4.5, "messages": None}, "a", "4.5"),
    ],
)
def test_fields_have_the_names_that_people_use(tmp_path: Path, row: dict[str, Any], prompt: str, answer: str) -> None:
    found = read_sft([write(tmp_path / "x.jsonl", row)])[0][0]
    assert (found.turns, found.answer) == ((("user", prompt),), answer)


@pytest.mark.parametrize(
    ("name", "given", "field", "language"),
    [
        ("alpaca.jsonl", "", None, "und"),
        ("alpaca.jsonl", "", "deu", "de"),
        ("alpaca.jsonl", "", "pt-BR", "pt"),
        ("alpaca.cs.jsonl", "", None, "cs"),
        ("alpaca.cs.jsonl", "", "de", "de"),
        ("alpaca.cs.jsonl", "fr=", "de", "fr"),
        ("alpaca.jsonl", "fr=", None, "fr"),
        ("de-en.jsonl", "", None, "und"),
    ],
)
def test_the_language_is_given_or_told_or_named_or_unknown(
    tmp_path: Path, name: str, given: str, field: str | None, language: str
) -> None:
    path = write(tmp_path / name, ROW | ({"language": field} if field else {}))
    assert read_sft([given + path])[0][0].language == language


def test_rows_without_text_are_left_out_and_count_as_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ROW | {"answer": " "}, ROW | {"prompt": ""}, ROW)
    assert len(read_sft([path])[0]) == 1
    assert len(read_sft([path], rows="2:")[0]) == 1
    with refuses("data.none-in-rows: :2.*3, 2 of them without"):
        read_sft([path], rows=":2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "sft.fields: 'messages'"),
        ({"answer": "a"}, "sft.fields: 'messages'"),
        ({}, "sft.fields"),
        ({"prompt": ["a"], "answer": "b"}, "sft.not-text: 'prompt'.*found list"),
        ({"prompt": "a", "answer": True}, "sft.not-text: 'answer'.*found bool"),
        ({"instruction": "a", "input": {}, "output": "b"}, "sft.not-text: 'input'.*found dict"),
        ({"messages": "a"}, "sft.too-few-turns: 'messages'"),
        ({"messages": MESSAGES[:1]}, "sft.too-few-turns: 'messages'"),
        ({"messages": MESSAGES[:2]}, "sft.last-turn: found system, user at the end"),
        ({"messages": [MESSAGES[0], MESSAGES[2]]}, "sft.last-turn: found system, assistant at the end"),
        (
            {"messages": [MESSAGES[1], MESSAGES[2], MESSAGES[2]]},
            "sft.last-turn: found user, assistant, assistant at the end",
        ),
        ({"messages": [{"role": "tool", "content": "x"}, *MESSAGES]}, "sft.turn: 'role'.*place 0"),
        ({"messages": [*MESSAGES[:2], {"role": "assistant", "content": 1}]}, "sft.turn: 'content'.*place 2"),
        ({"messages": [*MESSAGES[:2], "tell"]}, "sft.turn: 'content'.*'tell'.*place 2"),
        ([ROW], "row.not-object: found list"),
    ],
    ids=range(15),
)
def test_malformed_rows_are_refused_at_their_line(tmp_path: Path, row: Any, message: str) -> None:
    with refuses(message) as caught:
        read_sft([write(tmp_path / "x.jsonl", ROW, row)])
    assert "x.jsonl:2: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_json_is_refused_at_its_line(tmp_path: Path) -> None:
    with refuses(r"row.not-json: x\.jsonl.*3"):
        read_sft([pack(tmp_path / "x.jsonl", json.dumps(ROW) + "\n\nprompt\tanswer\n", "plain")])


texts = st.text(st.characters(codec="utf-8"), max_size=10).map(str.strip).filter(bool)
talk = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), max_size=5)


@given(talk, texts, texts)
def test_conversations_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, before: list[tuple[str, str]], ask: str, tell: str
) -> None:
    turns = [*before, ("user", ask)]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("assistant", tell)]]
    row = read_sft([write(tmp_path_factory.getbasetemp() / "talk.jsonl", {"messages": messages})])[0][0]
    assert (list(row.turns), row.answer) == (turns, tell)
