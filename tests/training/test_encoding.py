"""Rows that are too long: what is cut, what is left out, and what is taught all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adaptermix import TaskSettings, train_task
from adaptermix.tasks import get_task, get_template
from adaptermix.training.encoding import Examples, encode_rows

from ..refusals import refuses
from .data import Notes
from .test_joint import values

FILLER = " ".join(f"word{number}" for number in range(60))


@pytest.fixture(scope="module")
def tokenizer(causal: Path) -> Any:
    return AutoTokenizer.from_pretrained(causal)


def written(folder: Path, rows: list[dict[str, Any]], name: str = "train.de.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def encoded(task: str, path: str, tokenizer: Any, most: int, notes: Notes) -> Examples:
    kind = get_task(task)
    rows, _ = kind.read([path], rows=None)
    return encode_rows(kind, get_template(kind), rows, tokenizer, max_length=most, watch=notes)


def qa(context: str, *answers: str, begin: int | None = None, language: str = "de") -> dict[str, Any]:
    found = [{"text": a, "answer_start": context.index(a) if begin is None else begin} for a in answers]
    return {"question": "who?", "context": context, "answers": found, "language": language}


@pytest.mark.parametrize("before", [0, 1, 5, 30, 59, 60])
def test_a_context_is_cut_around_its_answer(before: int, tokenizer: Any, tmp_path: Path) -> None:
    words = FILLER.split()
    context = " ".join([*words[:before], "Ada Lovelace", *words[before:]])
    notes = Notes()
    examples = encoded("qa", written(tmp_path, [qa(context, "Ada Lovelace")]), tokenizer, 96, notes)
    [(prompt, answer)] = examples
    assert examples.taught == [0]
    assert len(prompt) + len(answer) <= 96
    text, asked = tokenizer.decode(prompt), tokenizer.decode(answer)
    assert asked == " Ada Lovelace</s>"
    assert text.startswith("Context: ")
    assert text.endswith("\nQuestion: who?\nAnswer:")
    kept = text.removeprefix("Context: ").removesuffix("\nQuestion: who?\nAnswer:")
    # a part of the context in whole words, with the answer, that fills most of the room
    assert f" {kept} " in f" {context} "
    assert "Ada Lovelace" in kept
    assert len(prompt) + len(answer) > 96 - 2 * len("word10 ")
    assert notes.said == [
        "1 of 1 (de 1) rows are longer than 96 tokens (--max-length) and lose a part of their prompts or answers."
    ]


def test_the_answer_that_is_taught_is_the_one_around_which_the_context_is_cut(tokenizer: Any, tmp_path: Path) -> None:
    context = f"Eve {FILLER} Eve Ada"
    row = qa(context, "Eve", begin=context.rindex("Eve"))
    [(prompt, _)] = encoded("qa", written(tmp_path, [row]), tokenizer, 72, Notes())
    assert "Eve Ada\nQuestion" in tokenizer.decode(prompt)


@pytest.mark.parametrize("most", [72, 2000])
def test_an_answer_that_does_not_stand_in_the_text_gives_way_to_one_that_does(
    most: int, tokenizer: Any, tmp_path: Path
) -> None:
    row = qa(f"{FILLER} Ada", "Countess Lovelace", "Ada", begin=0)
    examples = encoded("qa", written(tmp_path, [row]), tokenizer, most, Notes())
    [(prompt, answer)] = examples
    assert examples.taught == [0]
    assert tokenizer.decode(answer) == " Ada</s>"
    assert "Ada\nQuestion" in tokenizer.decode(prompt)


def test_rows_are_left_out_and_counted_by_language_where_no_answer_would_stand(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        qa("Ada wrote.", "Ada"),
        qa(FILLER, FILLER[:150], language="zh"),
        {**qa(FILLER, "word3"), "question": FILLER, "language": "zh"},
        {**qa(FILLER), "answers": ["Eve"], "language": "sw"},
    ]
    notes = Notes()
    examples = encoded("qa", written(tmp_path, rows), tokenizer, 96, notes)
    assert len(examples) == 4
    assert examples.taught == [0]
    assert notes.said == [
        "2 of 4 (zh 2) rows are longer than 96 tokens (--max-length), so that their answer would be cut away, "
        "and are left out.",
        "1 of 4 (sw 1) rows have answers that do not occur in their texts, and are left out.",
    ]


def test_what_a_text_does_not_answer_is_not_answered_by_its_beginning_either(tokenizer: Any, tmp_path: Path) -> None:
    [(prompt, answer)] = encoded("qa", written(tmp_path, [qa(FILLER)]), tokenizer, 96, Notes())
    assert tokenizer.decode(prompt).startswith("Context: word0 word1")
    assert tokenizer.decode(answer) == " unanswerable</s>"


@pytest.mark.parametrize(
    ("task", "lost", "kept"),
    [
        (
            "slots",
            {"text": f"Rome {FILLER}", "slots": [{"type": "city", "value": "Rome"}]},
            {"text": f"{FILLER} Rome", "slots": [{"type": "city", "value": "Rome"}]},
        ),
        (
            "ner-json",
            {"text": f"Ada {FILLER} Eve", "entities": [{"type": "PER", "text": n} for n in ("Ada", "Eve")]},
            {"text": f"{FILLER} Ada Eve", "entities": [{"type": "PER", "text": n} for n in ("Ada", "Eve")]},
        ),
        # values need not occur in the command at all
        (
            "slots",
            {"text": f"Rome {FILLER}", "slots": [{"type": "city", "value": "Rome"}]},
            {"text": FILLER, "slots": [{"type": "city", "value": "Rom"}]},
        ),
    ],
)
def test_values_that_are_cut_away_are_not_taught(
    task: str, lost: dict[str, Any], kept: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    notes = Notes()
    examples = encoded(task, written(tmp_path, [lost, kept]), tokenizer, 200, notes)
    assert examples.taught == [1]
    assert any("1 of 2 (de 1) rows are longer" in note and "left out" in note for note in notes.said)
    assert any("1 of 2 (de 1) rows are longer" in note and "lose a part" in note for note in notes.said)


def test_half_a_sentence_is_not_taught_as_translated_whole(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "de-en.tsv").write_text(f"kurz\tshort\n{FILLER}\tlong\nkurz\t{FILLER}\n")
    notes = Notes()
    examples = encoded("translate", str(tmp_path / "de-en.tsv"), tokenizer, 150, notes)
    assert examples.taught == [0]
    assert "2 of 3 (de-en 2) rows" in notes.said[0]


def test_a_long_instruction_and_its_long_answer_share_the_length(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say it.", "answer": FILLER},
        {"prompt": FILLER, "answer": FILLER},
        {"prompt": FILLER, "answer": "no"},
    ]
    examples = encoded("sft", written(tmp_path, rows), tokenizer, 100, Notes())
    assert examples.taught == [0, 1, 2]
    lengths = [(len(prompt), len(answer)) for prompt, answer in examples]
    assert lengths == [(8, 92), (50, 50), (97, 3)]
    assert [tokenizer.decode(answer).endswith("</s>") for _, answer in examples] == [False, False, True]
    assert tokenizer.decode(examples[0][0]) == "Say it.\n"


def test_rows_that_are_left_out_are_not_drawn_and_not_counted_as_a_pass(causal: Path, tmp_path: Path) -> None:
    rows = [qa("Ada wrote.", "Ada"), qa("Eve sat.", "Eve"), qa(FILLER, FILLER[:150]), qa("Bob is in.", "Eve", begin=0)]
    own: dict[str, Any] = {"task": "qa", "train": [written(tmp_path, rows)], "max_length": 96}
    settings = TaskSettings(**values(causal, tmp_path, **own, batch_size=1, steps=None, epochs=1))
    report = train_task(settings)
    assert [entry["rows"] for entry in report.history] == [1, 1]
    whole = [f"Context: {row['context']}\nQuestion: who?\nAnswer: {row['answers'][0]['text']}</s>" for row in rows[:2]]
    assert sorted(entry["tokens"] for entry in report.history) == sorted(len(text) - 3 for text in whole)
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert manifest["rows"]["taught"] == 2
    nothing: dict[str, Any] = own | {"train": [written(tmp_path, rows[2:])], "out": str(tmp_path / "no")}
    with refuses(r"train.no-rows: 1 of 2 \(de 1\) rows are longer"):
        train_task(TaskSettings(**values(causal, tmp_path, **nothing)))
    assert not (tmp_path / "no").exists()
