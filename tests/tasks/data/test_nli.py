"""Premises and hypotheses in every form, their labels, and refusals that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.tasks import get_task
from adaptermix.tasks.nli import NliRow

from ...refusals import refuses
from .test_readers import PACKINGS, pack

read_nli = get_task("nli").read

FILES = {
    "de.tsv": 'Er "ging".\tEr lief, ja.\tentailment\n\nRot\tGrün\tcontradictory\n',
    "de.csv": '"Er ""ging"".","Er lief, ja.",entailment\nRot,Grün,contradiction\n',
    "de.mt.tsv": 'premise\thypo\tlabel\nEr "ging".\tEr lief, ja.\tentailment\nRot\tGrün\tcontradictory\n',
    "xnli.dev.tsv": (
        "language\tgold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1\tsentence2\tlabel1\n"
        'de\tentailment\t\t\tEr "ging".\tEr lief, ja.\tneutral\nde\tcontradiction\t\t\tRot\tGrün\tneutral\n'
    ),
    "de.jsonl": (
        '{"premise": "Er \\"ging\\".", "hypothesis": "Er lief, ja.", "label": 0}\n\n'
        '{"premise": "Rot", "hypothesis": "Grün", "label": "Contradiction"}\n'
    ),
    "snli.jsonl": (
        '{"sentence1": "Er \\"ging\\".", "sentence2": "Er lief, ja.", "gold_label": "entailment", "language": "deu"}\n'
        '{"sentence1": "Rot", "sentence2": "Grün", "gold_label": "contradiction", "language": "de-DE", "label": "x"}\n'
    ),
}
ROWS = [
    NliRow(premise='Er "ging".', hypothesis="Er lief, ja.", label="entailment", language="de"),
    NliRow(premise="Rot", hypothesis="Grün", label="contradiction", language="de"),
]


@PACKINGS
@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    assert read_nli([pack(tmp_path / name, FILES[name], packing)])[0] == ROWS


@pytest.mark.parametrize(
    ("written", "label"),
    [(0, "entailment"), (1, "neutral"), (2, "contradiction"), ("1", "neutral"), ("NEUTRAL", "neutral")],
)
def test_numbers_and_names_are_labels(tmp_path: Path, written: object, label: str) -> None:
    row = {"premise": "a", "hypothesis": "b", "label": written}
    path = pack(tmp_path / "de.jsonl", json.dumps(row) + "\n", "plain")
    assert read_nli([path])[0][0].label == label


def test_rows_without_agreement_are_left_out_and_count_as_rows(tmp_path: Path) -> None:
    path = pack(tmp_path / "de.tsv", "a\tb\tneutral\nc\td\t-\ne\tf\tneutral\ng\th\t-\n", "plain")
    assert [row.premise for row in read_nli([path])[0]] == ["a", "e"]
    assert [row.premise for row in read_nli([path], rows="1:3")[0]] == ["e"]
    with refuses("data.none-in-rows: 3:.*4, 2 of them without a label"):
        read_nli([path], rows="3:")
    row = {"premise": "a", "hypothesis": "b", "label": -1}
    with refuses("data.none-in-rows: 1, 1 of them without"):
        read_nli([pack(tmp_path / "de.jsonl", json.dumps(row) + "\n", "plain")])


def test_one_file_may_hold_many_languages(tmp_path: Path) -> None:
    text = "language\tgold_label\tsentence1\tsentence2\nde\tneutral\ta\tb\nzh\tneutral\tc\td\n"
    path = pack(tmp_path / "xnli.test.tsv", text, "plain")
    assert [row.language for row in read_nli([path])[0]] == ["de", "zh"]
    assert [row.language for row in read_nli([f"sw={path}"])[0]] == ["sw", "sw"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("de.tsv", "a\tb\tneutral\na\tb\n", r"table.columns: de\.tsv:2: .*found 2"),
        ("de.tsv", "a\tb\t-\na\tb\tmaybe\n", r"row.label: de\.tsv:2: .*found 'maybe'"),
        ("de.tsv", "neutral\ta\tb\n", r"row.label: de\.tsv:1: .*found 'b'"),
        ("de.tsv", "a\t \tneutral\n", r"row.missing-field: de\.tsv:1: .*hypothesis"),
        ("de.tsv", "premise\thypothesis\tgold\na\tb\tneutral\n", r"table.header: de\.tsv:1: .*'gold_label'"),
        ("de.jsonl", '{"premise": "a", "label": 0}\n', r"row.missing-field: de\.jsonl:1: .*hypothesis"),
        ("de.jsonl", '{"premise": "a", "hypothesis": "b", "label": 3}\n', r"row.label: de\.jsonl:1: .*found '3'"),
        (
            "de.jsonl",
            '{"premise": "a", "hypothesis": 1, "label": false}\n',
            r"table.not-text: de\.jsonl:1: .*found bool",
        ),
        ("xnli.tsv", "a\tb\tneutral\n", "data.no-language"),
    ],
    ids=range(9),
)
def test_malformed_rows_are_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with refuses(message) as caught:
        read_nli([pack(tmp_path / name, text, "plain")])
    assert "\n" not in str(caught.value)
