"""Questions on texts: SQuAD JSON and JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix.tasks import get_task
from adaptermix.tasks.qa import QaRow

from ...refusals import refuses
from .test_readers import PACKINGS, pack

read_qa = get_task("qa").read

SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "x",
            "paragraphs": [
                {
                    "context": "Ada wrote\nprograms.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Who? ",
                            "answers": [{"text": t, "answer_start": 0} for t in ("Ada", "Ada wrote", "Ada")],
                        },
                        {
                            "id": 2,
                            "question": "When?",
                            "answers": [],
                            "is_impossible": True,
                            "plausible_answers": [{"text": "Ada", "answer_start": 0}],
                        },
                    ],
                },
                {"context": "Nothing.", "qas": []},
            ],
        }
    ],
}
ROWS = [
    {"id": "q1", "question": "Who?", "context": "Ada wrote\nprograms.", "answers": ["Ada", "Ada wrote"]},
    {"id": "2", "question": "When?", "context": "Ada wrote\nprograms.", "answers": []},
]
EXPECTED = [
    QaRow(
        id="q1",
        question="Who?",
        context="Ada wrote\nprograms.",
        answers=("Ada", "Ada wrote"),
        language="de",
        spans=((0, 3), (0, 9)),
    ),
    QaRow(id="2", question="When?", context="Ada wrote\nprograms.", answers=(), language="de"),
]
FORMS = {
    "xquad.de.json": json.dumps(SQUAD, indent=2),
    "line.de.json": json.dumps(SQUAD),
    "rows.de.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n",
    "rows.de.json": "\n\n".join(map(json.dumps, ROWS)) + "\n",
    "rows.de": "\n".join(map(json.dumps, ROWS)) + "\n",
}


@PACKINGS
@pytest.mark.parametrize("name", FORMS)
def test_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    rows, files = read_qa([pack(tmp_path / name, FORMS[name], packing)])
    assert rows == EXPECTED
    assert files[0].language == "de"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"answers": "Ada"}, ("Ada",)),
        ({"answer": "Ada"}, ("Ada",)),
        ({"answers": [" Ada \n wrote "]}, ("Ada wrote",)),
        ({"answers": {"text": ["Ada", "Eve"], "answer_start": [0, 1]}}, ("Ada", "Eve")),
        ({"answers": {"text": [], "answer_start": []}}, ()),
        ({"answers": [{"text": "Ada"}, "Eve", {"text": "Ada"}]}, ("Ada", "Eve")),
        ({"answers": ["", "Ada"]}, ("Ada",)),
        ({"answers": [""]}, ()),
        ({"answers": ["Ada"], "is_impossible": True}, ()),
        ({"answers": ["Ada"], "is_impossible": False}, ("Ada",)),
        ({"is_impossible": True}, ()),
    ],
)
def test_answers_come_in_many_forms(tmp_path: Path, answers: dict[str, Any], expected: tuple[str, ...]) -> None:
    row = {"question": "Who?", "context": "Ada"} | answers
    found = read_qa([pack(tmp_path / "en.jsonl", json.dumps(row) + "\n", "plain")])[0][0]
    assert (found.answers, found.id) == (expected, "")


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ({"text": "Ada", "answer_start": 9}, (8, 11)),  # the one nearest to where it is said to be
        ({"text": "Ada", "answer_start": 1}, (0, 3)),
        ({"text": " Ada ", "answer_start": 99}, (8, 11)),
        ("Ada", (0, 3)),
        ("saw Ada", (4, 11)),  # blanks are a line break there
        ("Eve", None),
    ],
)
def test_answers_have_their_place_in_the_text(tmp_path: Path, answer: Any, place: tuple[int, int] | None) -> None:
    row = {"question": "Who?", "context": "  Ada saw\nAda. ", "answers": [answer]}
    found = read_qa([pack(tmp_path / "en.jsonl", json.dumps(row) + "\n", "plain")])[0][0]
    assert found.spans == (place,)
    assert place is None or found.context[slice(*place)].split() == found.answers[0].split()


def test_the_language_is_given_or_told_or_named(tmp_path: Path) -> None:
    path = pack(tmp_path / "dev.cs.jsonl", json.dumps(ROWS[0] | {"language": "deu"}) + "\n", "plain")
    assert read_qa([path])[0][0].language == "de"
    assert read_qa([f"fr={path}"])[0][0].language == "fr"
    squad = pack(tmp_path / "dev-v2.0.json", FORMS["xquad.de.json"], "plain")
    assert {row.language for row in read_qa([f"en={squad}"])[0]} == {"en"}
    with refuses(r"data.no-language: dev-v2\.0\.json"):
        read_qa([squad])


def test_rows_pick_questions_of_each_file(tmp_path: Path) -> None:
    files = [pack(tmp_path / name, FORMS[name], "plain") for name in ("xquad.de.json", "rows.de.jsonl")]
    assert [row.id for row in read_qa(files, rows="1:")[0]] == ["2", "2"]
    with refuses("data.none-in-rows: 2:.*2"):
        read_qa(files, rows="2:")


def changed(path: list[Any], value: Any) -> str:
    """SQUAD with one value replaced, or taken out where it is None."""
    document = json.loads(json.dumps(SQUAD))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    if value is None:
        del place[path[-1]]
    return json.dumps(document, indent=1)


QAS = ["data", 0, "paragraphs", 0, "qas"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("de.json", '{"data": [\n{"paragraphs":\n}]}', r"qa.format: de\.json:3: "),
        ("de.json", "[1,\n2]", r"qa.no-data: de\.json:1: .*'data'"),
        ("de.json", '{\n"question": "a"}', r"qa.no-data: de\.json:1: .*'data'"),
        ("de.json", "[" * 100_000, r"qa.too-deep: de\.json:1: "),
        ("de.json", '{"data": {}}', r"qa.not-list: de\.json: .*'data'"),
        ("de.json", changed(["data", 0], 5), r"qa.not-list: de\.json: .*'data'"),
        ("de.json", changed(["data", 0, "paragraphs"], None), r"qa.not-list: de\.json: .*'paragraphs'"),
        ("de.json", changed(QAS, None), r"qa.not-list: de\.json: .*'qas'"),
        ("de.json", changed([*QAS, 1, "question"], None), r"qa.not-text: paragraphs\[0\]\.qas\[1\].*'question'"),
        ("de.json", changed([*QAS[:-1], "context"], " "), "data.none-in-rows: has 2, 2"),
        ("de.json", changed([*QAS, 0, "answers"], None), r"qa.answers: qas\[0\].*found 'None'"),
        ("de.json", changed([*QAS, 0, "answers"], [{}]), r"qa.answers: qas\[0\]"),
        ("de.json", changed(["data"], []), "data.none-in-rows: has 0"),
        ("de.jsonl", FORMS["rows.de.jsonl"] + '{"question": "a"}\n', r"qa.not-text: de\.jsonl:3: .*'context'"),
        ("de.jsonl", FORMS["rows.de.jsonl"] + "\n{\n", r"row.not-json: de\.jsonl:4: "),
        ("de.jsonl", json.dumps(ROWS[0] | {"answers": [1]}) + "\n", r"qa.answers: de\.jsonl:1: "),
        ("de.jsonl", json.dumps(ROWS[0] | {"answers": None}) + "\n", r"qa.answers: de\.jsonl:1: "),
        ("de.jsonl", "[1]\n", r"row.not-object: de\.jsonl:1: .*found list"),
        ("de.json", "\n\n", r"qa.format: de\.json:\d: "),
    ],
    ids=range(19),
)
def test_malformed_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with refuses(message) as caught:
        read_qa([pack(tmp_path / name, text, "plain")])
    assert "\n" not in str(caught.value)
