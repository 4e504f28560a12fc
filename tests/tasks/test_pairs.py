"""Pairs of texts in every published layout, their labels, and refusals that name the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.tasks import clusters_of, get_task
from adaptermix.tasks.pairs import PairRow

from ..refusals import refuses
from ..scoring import count
from .data.test_readers import PACKINGS, pack

TASK = get_task("pairs")
ROWS = [("Rom ist alt.", 'Alt ist "Rom".', "1"), ("Rom ist alt.", "Rom ist neu, ja.", "0")]
FILES = {
    # PAWS-X, then the same in the layout of XTREME.
    "de.paws.tsv": (
        'id\tsentence1\tsentence2\tlabel\n1\tRom ist alt.\tAlt ist "Rom".\t1\n2\tRom ist alt.\tRom ist neu, ja.\t0\n'
    ),
    "train-de.tsv": 'Rom ist alt.\tAlt ist "Rom".\t1\nRom ist alt.\tRom ist neu, ja.\t0\n',
    # QAM on the Hub.
    "de.jsonl": "".join(json.dumps({"question": q, "answer": a, "label": int(label)}) + "\n" for q, a, label in ROWS),
    "de.csv": 'text1,text2,label\nRom ist alt.,"Alt ist ""Rom"".",1\nRom ist alt.,"Rom ist neu, ja.",0\n',
}
ADS = {
    "xglue.qadsm.de.dev": "rad kaufen\tRäder\tBei uns.\tGood\nrad kaufen\tRom\t\tBad\n",
    "de.tsv": (
        "query\tad_title\tad_description\trelevance_label\nrad kaufen\tRäder\tBei uns.\tGood\nrad kaufen\tRom\t\tBad\n"
    ),
    "de.jsonl": (
        '{"query": "rad kaufen", "ad_title": "Räder", "ad_description": "Bei uns.", "relevance_label": "Good"}\n'
        '{"query": "rad kaufen", "ad_title": "Rom", "ad_description": "", "relevance_label": "Bad"}\n'
    ),
}


@PACKINGS
@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    expected = [PairRow(first=first, second=second, label=label, language="de") for first, second, label in ROWS]
    assert TASK.read([pack(tmp_path / name, FILES[name], packing)])[0] == expected


@pytest.mark.parametrize("name", ADS)
def test_title_and_description_are_one_text(tmp_path: Path, name: str) -> None:
    rows, files = TASK.read([pack(tmp_path / name, ADS[name], "plain")])
    assert [(TASK.texts(row), TASK.answer(row)) for row in rows] == [
        (("rad kaufen", "Räder Bei uns."), "Good"),
        (("rad kaufen", "Rom"), "Bad"),
    ]
    assert TASK.fields(rows[0]) == {"first": "rad kaufen", "second": "Räder Bei uns."}
    assert files[0].left_out == 0


def test_pairs_with_one_first_text_are_resampled_together(tmp_path: Path) -> None:
    rows, _ = TASK.read([pack(tmp_path / "de.tsv", FILES["train-de.tsv"], "plain")])
    assert clusters_of(TASK, rows) == ["Rom ist alt.", "Rom ist alt."]


def test_labels_are_free_and_other_answers_are_wrong(tmp_path: Path) -> None:
    rows, _ = TASK.read([pack(tmp_path / "de.tsv", "a\tb\tsame\nc\td\tother\n", "plain")])
    assert TASK.labels(rows) == ("other", "same")
    statistics = [metric.count(rows[0], "Same.") for metric in TASK.metrics(rows)]
    assert statistics == [(True, 1), [0.0, 0.0, 0.0, 1, 0.0, 0.0]]
    assert count(TASK, rows[0], "neither")["accuracy"] == (False, 1)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("1\ta\tb\t1\n2\tc\td\t0\n", "pairs.numbered"),
        ("one\ttwo\tgold\na b\tb\t1\nc d\td\t0\ne f\tf\t1\n", "row.header-like"),
        ("sentence1\tother\tlabel\na\tb\t1\n", "table.header"),
        ("a\tb\t1\nc\td\n", "table.columns"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, text: str, code: str) -> None:
    path = pack(tmp_path / "de.tsv", text, "plain")
    with refuses(rf"{code}: de\.tsv"):
        TASK.read([path])


def test_numbers_of_rows_are_noticed_where_only_some_rows_are_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "de.tsv", "1\ta\tb\t1\n2\tc\td\t0\n3\te\tf\t0\n", "plain")
    with refuses("pairs.numbered"):
        TASK.read([path], rows=":2")
