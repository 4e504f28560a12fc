"""Rows that lack a part are left out and counted, by every reader that lets them pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.tasks import get_task
from adaptermix.tasks.data import read_pairs

CASES: list[tuple[str, dict[str, str], list[int]]] = [
    ("sft", {"de.jsonl": '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n'}, [1]),
    (
        "sft",
        {
            "de.jsonl": '{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}]}\n{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": null}]}\n'
        },
        [1],
    ),
    ("classify", {"de.tsv": "a\tx\n \tx\nb\t\n"}, [2]),
    ("classify", {"de.csv": "label,text\nx,a\nx,\n"}, [1]),
    (
        "classify",
        {
            "de.jsonl": '{"text": "a", "label": "x"}\n{"text": "", "label": "x"}\n{"text": null, "label": "x"}\n'
            '{"text": "b"}\n{"text": "b", "label": null}\n'
        },
        [4],
    ),
    ("nli", {"de.tsv": "a\tb\tneutral\n \tb\tneutral\na\t\tneutral\na\tb\t\n"}, [3]),
    ("slots", {"de.jsonl": '{"text": "a", "slots": []}\n{"text": " ", "slots": []}\n'}, [1]),
    ("slots", {"de.jsonl": '{"annot_utt": "a [x : b]"}\n{"annot_utt": ""}\n'}, [1]),
    ("ner-json", {"de.jsonl": '{"text": "a", "entities": []}\n{"text": "", "entities": []}\n'}, [1]),
    ("ner-json", {"de.jsonl": '{"tokens": ["a"], "tags": ["O"]}\n{"tokens": [], "tags": []}\n'}, [1]),
    (
        "qa",
        {
            "de.jsonl": '{"question": "a", "context": "b", "answers": ["b"]}\n{"question": "", "context": "b", '
            '"answers": ["b"]}\n{"question": "a", "context": " ", "answers": []}\n'
        },
        [2],
    ),
    ("nli", {"de.tsv": "a\tb\tneutral\na\tb\t-\na\tb\t-\n"}, [2]),
    ("nli", {"de.tsv": "a\tb\tneutral\na\tb\tmaybe\n"}, [1]),
    (
        "qa",
        {
            "de.jsonl": '{"question": "a", "context": "b", "answers": ["b"]}\n{"question": null, "context": "b", '
            '"answers": ["b"]}\n{"question": "a", "context": null, "answers": []}\n'
        },
        [2],
    ),
    ("slots", {"de.jsonl": '{"text": "a", "slots": []}\n{"text": null, "slots": []}\n'}, [1]),
    ("ner-json", {"de.jsonl": '{"text": "a", "entities": []}\n{"text": null, "entities": []}\n'}, [1]),
    (
        "ner-json",
        {
            "de.jsonl": '{"tokens": ["a"], "entities": []}\n'
            '{"tokens": ["a"], "entities": [{"type": "X", "text": "b"}]}\n'
        },
        [1],
    ),
    ("translate", {"de-en.jsonl": '{"source": "a", "target": "b"}\n{"source": "a", "target": null}\n'}, [1]),
    ("translate", {"de-en.tsv": "a\tb\n\tc\nd\t\n"}, [2]),
    ("translate", {"x.de.txt": "a\n\nb\n", "x.en.txt": "a\nb\n\n"}, [2, 0]),
    ("translate", {"en-de.src.en": "a\nb\n", "en-de.ref.de": "a\n\n"}, [1, 0]),
]


@pytest.mark.parametrize(("name", "texts", "counts"), CASES)
def test_rows_left_out_are_counted_by_file(name: str, texts: dict[str, str], counts: list[int], tmp_path: Path) -> None:
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    rows, files = get_task(name).read([str(tmp_path / file) for file in texts], rows=None)
    assert [file.left_out for file in files] == counts
    assert len(rows) == 1
    rows, files = get_task(name).read([str(tmp_path / file) for file in texts], rows=":1")
    assert [file.left_out for file in files] == [0] * len(files)


HALVES: list[tuple[str, dict[str, object]]] = [
    ("classify", {"text": "a\ud83d", "label": "x\ud83d"}),
    ("nli", {"premise": "a\ud83d", "hypothesis": "b", "label": 0}),
    ("slots", {"text": "a\ud83d b", "slots": [{"type": "x\udc00", "value": "a\ud83d"}]}),
    ("ner-json", {"tokens": ["a\ud83d"], "tags": ["B-X\ud83d"]}),
    ("qa", {"question": "a\udc00", "context": "b\ud83d", "answers": ["b\ud83d"]}),
    ("sft", {"prompt": "a\ud83d", "answer": "b\udc00"}),
]


@pytest.mark.parametrize(("name", "row"), HALVES, ids=[name for name, _ in HALVES])
def test_halves_of_characters_are_replaced_at_reading(name: str, row: dict[str, object], tmp_path: Path) -> None:
    """As tweets cut by length have them; no tokenizer takes them, and no file either."""
    whole = row | {"id": "\N{GRINNING FACE}"}
    (tmp_path / "de.jsonl").write_text(json.dumps(whole) + "\n")
    task = get_task(name)
    [found] = task.read([str(tmp_path / "de.jsonl")], rows=None)[0]
    said = "".join([*task.texts(found), task.answer(found)])
    said.encode()
    assert "\ufffd" in said


def test_halves_of_characters_in_squad_and_in_pairs_are_replaced_and_whole_ones_kept(tmp_path: Path) -> None:
    block = {"context": "b\ud83d \N{GRINNING FACE}", "qas": [{"question": "a", "answers": [{"text": "b\ud83d"}]}]}
    (tmp_path / "de.json").write_text(json.dumps({"data": [{"paragraphs": [block]}]}))
    [row] = get_task("qa").read([str(tmp_path / "de.json")], rows=None)[0]
    assert (row.context, row.answers) == ("b\ufffd \N{GRINNING FACE}", ("b\ufffd",))
    (tmp_path / "de-en.jsonl").write_text(json.dumps({"source": "a\ud83d", "target": "b"}))
    assert read_pairs([str(tmp_path / "de-en.jsonl")])[0][0].source == "a\ufffd"
