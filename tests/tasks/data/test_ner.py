"""Named entities from IOB2 and JSONL, where they stand in tokens, and refusals that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.scheme import IOB2, Entities

from adaptermix.tasks import get_task
from adaptermix.tasks.ner_json import NerRow
from adaptermix.tasks.tagged import iob2_spans, tag_entities

from ...refusals import refuses
from .test_readers import PACKINGS, pack

read_ner = get_task("ner-json").read

FILES = {
    "en.dev.iob2": "Ada\tB-PER\nLovelace\tI-PER\nin\tO\nBath\tB-LOC\n\n\n#\tO\n1\tO\n",
    "en_ewt-ud-dev.iob2": (
        "# newdoc id = 1\n# sent_id = 1\n# text = Ada Lovelace in Bath\n"
        "1\tAda\tB-PER\t-\tann\n2\tLovelace\tI-PER\t-\tann\n3\tin\tO\t-\tann\n4\tBath\tB-LOC\t-\tann\n\n"
        "# sent_id = 2\n1\t#\tO\t-\tann\n2\t1\tO\t-\tann\n"
    ),
    "en.conll": (
        "-DOCSTART- -X- -X- O\n\nAda NNP B-NP B-PER\nLovelace NNP I-NP I-PER\nin IN B-PP O\nBath NNP B-NP B-LOC\n\n"
        "# NN B-NP O\n1 CD I-NP O\n"
    ),
    "en.middle.iob2": "Ada\tPROPN\tB-PER\n"
    + "Lovelace\tPROPN\tI-PER\nin\tADP\tO\nBath\tPROPN\tB-LOC\n\n#\tSYM\tO\n1\tNUM\tO\n",
    "en.jsonl": (
        '{"tokens": ["Ada", "Lovelace", "in", "Bath"], "entities": [{"type": "PER", "text": "Ada Lovelace"}, '
        '{"type": "LOC", "text": "Bath"}]}\n\n{"text": "# 1", "tokens": ["#", "1"], "entities": []}\n'
    ),
}
ROWS = [
    NerRow(
        text="Ada Lovelace in Bath",
        entities=(("PER", "Ada Lovelace"), ("LOC", "Bath")),
        language="en",
        tokens=("Ada", "Lovelace", "in", "Bath"),
        tags=("B-PER", "I-PER", "O", "B-LOC"),
    ),
    NerRow(text="# 1", entities=(), language="en", tokens=("#", "1"), tags=("O", "O")),
]


@PACKINGS
@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    rows, files = read_ner([pack(tmp_path / name, FILES[name], packing)])
    assert rows == ROWS
    assert files[0].language == "en"


def test_comments_give_the_text_and_entities_stand_as_in_it(tmp_path: Path) -> None:
    text = "# text = Al-Zaman: Ann, Ann Lee.\n" + "".join(
        f"{token}\t{tag}\n"
        for token, tag in [
            ("Al", "B-ORG"),
            ("-", "I-ORG"),
            ("Zaman", "I-ORG"),
            (":", "O"),
            ("Ann", "O"),
            (",", "O"),
            ("Ann", "B-PER"),
            ("Lee", "I-PER"),
            (".", "O"),
        ]
    )
    row = read_ner([pack(tmp_path / "en.iob2", text, "plain")])[0][0]
    assert row.text == "Al-Zaman: Ann, Ann Lee."
    assert row.entities == (("ORG", "Al-Zaman"), ("PER", "Ann Lee"))


def test_entities_that_the_text_contracts_are_their_tokens(tmp_path: Path) -> None:
    """Portuguese treebanks split `das` into `de as`."""
    text = "# text = Rio das Ostras\nRio\tB-LOC\nde\tI-LOC\nas\tI-LOC\nOstras\tI-LOC\n"
    assert read_ner([pack(tmp_path / "pt.iob2", text, "plain")])[0][0].entities == (("LOC", "Rio de as Ostras"),)


@pytest.mark.parametrize(
    ("code", "text", "place"), [("zh", "在北京", "北京"), ("ja", "在北京", "北京"), ("ko", "在 北 京", "北 京")]
)
def test_chinese_and_japanese_tokens_are_joined_without_blanks(
    tmp_path: Path, code: str, text: str, place: str
) -> None:
    row = read_ner([pack(tmp_path / f"{code}.iob2", "在\tO\n北\tB-LOC\n京\tI-LOC\n", "plain")])[0][0]
    assert (row.text, row.entities) == (text, (("LOC", place),))
    entity = {"type": "LOC", "text": place}
    spelled = json.dumps({"tokens": ["在", "北", "京"], "entities": [entity], "language": code}) + "\n"
    again = read_ner([pack(tmp_path / "x.jsonl", spelled, "plain")])[0][0]
    assert again == row


def test_a_few_tags_that_begin_with_i_are_outside(tmp_path: Path) -> None:
    row = read_ner([pack(tmp_path / "da.iob2", "a\tI-PER\nb\tB-PER\nc\tI-LOC\nd\tB-LOC\n", "plain")])[0][0]
    assert row.entities == (("PER", "b"), ("LOC", "d"))


def test_iob1_is_refused_rather_than_read_as_empty(tmp_path: Path) -> None:
    with refuses(r"data.iob1: en\.iob2.*2.*2.*1"):
        read_ner([pack(tmp_path / "en.iob2", "a\tO\nb\tI-PER\nc\tB-PER\nd\tO\ne\tI-LOC\n", "plain")])


@pytest.mark.parametrize("field", ["ner_tags", "tags"])
def test_iob1_in_jsonl_is_refused_as_in_columns(field: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["EU", "says"], field: ["I-ORG", "O"]}, {"tokens": ["Ada", "B"], field: ["I-PER", "I-PER"]}]
    rows.insert(1, {"tokens": ["a", "b"], field: ["B-LOC", "O"]})
    path = tmp_path / "en.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refuses(r"data.iob1: en\.jsonl.*1.*2.*1"):
        read_ner([str(path)])
    # few of many are strays, which are outside
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], rows[1]]))
    assert [row.entities for row in read_ner([str(path)])[0]] == [(), (("LOC", "a"),)]


@pytest.mark.parametrize("name", ["en.jsonl", "en.iob2"])
def test_iob1_is_refused_where_a_part_of_the_rows_is_asked_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    row = json.dumps({"tokens": ["EU", "says"], "ner_tags": ["I-ORG", "O"]}) + "\n"
    path.write_text((row if name == "en.jsonl" else "EU\tI-ORG\nsays\tO\n\n") * 9)
    with refuses("data.iob1: 4.*0"):
        read_ner([str(path)], rows=":4")


def test_jsonl_needs_no_tokens_and_entities_need_not_occur(tmp_path: Path) -> None:
    row = {"text": "in München", "entities": [{"type": "LOC", "text": "Munich"}], "language": "deu"}
    path = pack(tmp_path / "x.jsonl", json.dumps(row) + "\n", "plain")
    assert read_ner([path])[0] == [NerRow(text="in München", entities=(("LOC", "Munich"),), language="de")]
    assert read_ner([f"fr={path}"])[0][0].language == "fr"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("en.iob2", "a\tO\nb\n", r"row.columns: en\.iob2.*2.*2.*1.*'b'"),
        ("en.iob2", "a\tO\nb\tO\tx\n", r"row.columns: en\.iob2.*2.*2.*3"),
        ("en.iob2", "a\tO\n#\tX\n", r"row.tag: en\.iob2.*2.*'X'"),
        ("en.iob2", "a\tO\nb\tPER\n", r"row.tag: en\.iob2.*2.*'PER'"),
        ("en.iob2", "a\tO\nb\tB-\n", r"row.tag: en\.iob2.*2.*'B-'"),
        ("en.iob2", "a\tO\nb\tb-PER\n", r"row.tag: en\.iob2.*2"),
        ("en.iob2", "a\tO\n \tO\n", r"row.token-number: en\.iob2.*2"),
        ("en.iob2", "\n# text = a b\na\tPER\n", r"row.token-tag: en\.iob2.*3.*'a PER'"),
        ("en.iob2", "# text = a\n\n\n", "data.empty"),
        ("en.iob2", "1\ta\tO\n\n1\ta\tO\n1-2\tb\tO\n", r"row.token-number: en\.iob2.*4.*'1-2"),
        ("en.conll", "a NN O\nb O\n", r"row.columns: en\.conll.*2.*3.*2"),
        ("data.iob2", "a\tO\n", "data.no-language"),
        ("en.jsonl", '{"text": "a"}\n', r"row.ner-json: en\.jsonl.*1"),
        ("en.jsonl", '{"entities": []}\n', "data.none-in-rows: 1, 1 of them without a label, an answer or a text"),
        ("en.jsonl", '{"text": "a", "entities": [{"type": "PER"}]}\n', r"row.ner-json: en\.jsonl.*1"),
        ("en.jsonl", '{"text": "a", "entities": [{"type": "PER", "text": 1}]}\n', r"row.ner-json: en\.jsonl.*1"),
        ("en.jsonl", '{"text": "a", "entities": [{"type": " ", "text": "a"}]}\n', r"row.ner-json: en\.jsonl.*1"),
        ("en.jsonl", '{"tokens": "ab", "entities": []}\n', r"row.ner-json: en\.jsonl.*1"),
        ("en.jsonl", '{"tokens": {"a": 1}, "entities": []}\n', r"row.ner-json: en\.jsonl.*1"),
        (
            "en.jsonl",
            '{"text": " ", "entities": []}\n',
            "data.none-in-rows: 1, 1 of them without a label, an answer or a text",
        ),
        ("en.jsonl", '{"tokens": ["a", null], "entities": []}\n', r"row.ner-json: en\.jsonl.*1"),
        ("en.jsonl", '{"text": null, "entities": null}\n', r"row.ner-json: en\.jsonl.*1"),
        ("en.jsonl", '{"text": "a", "entities": [], "language": 5}\n', r"row.ner-json: en\.jsonl.*1"),
        (
            "en.jsonl",
            '{"tokens": ["a", "b"], "entities": [{"type": "X", "text": "a b"}, {"type": "X", "text": "b"}]}\n',
            r"row.entity-not-found: en\.jsonl.*1.*1.*2",
        ),
        (
            "x.en.jsonl",
            '{"tokens": ["a"], "ner_tags": [0]}',
            "row.tag: 1.*0.*Numbers need",
        ),
        (
            "x.en.jsonl",
            '{"tokens": ["a"], "tags": ["B-X", "O"]}',
            "row.tokens-tags: 1",
        ),
        ("x.en.jsonl", '{"tokens": [" "], "tags": ["O"]}', "row.tokens-tags: 1"),
        ("x.en.jsonl", '{"tokens": ["a"], "tags": ["X"]}', "row.tag: 1.*'X'"),
    ],
    ids=range(28),
)
def test_malformed_rows_are_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with refuses(message) as caught:
        read_ner([pack(tmp_path / name, text, "plain")])
    assert "\n" not in str(caught.value)


def test_rows_pick_sentences(tmp_path: Path) -> None:
    path = pack(tmp_path / "en.iob2", "a\tO\n\nb\tO\nc\tO\n\nd\tO\n", "plain")
    assert [row.text for row in read_ner([path], rows="1:2")[0]] == ["b c"]
    with refuses("data.none-in-rows: 3:.*3"):
        read_ner([path], rows="3:")


tag_lists = st.lists(st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]), max_size=9)


@given(tag_lists)
def test_spans_are_those_of_seqeval_in_strict_iob2(tags: list[str]) -> None:
    expected = [entity.to_tuple()[1:] for entity in Entities([tags], IOB2).entities[0]]
    assert iob2_spans(tags) == expected


@given(tag_lists)
def test_entities_of_distinct_tokens_are_found_where_they_were(tags: list[str]) -> None:
    tokens = [f"t{place}." for place in range(len(tags))]
    entities = [(kind, " ".join(tokens[start:stop])) for kind, start, stop in iob2_spans(tags)]
    assert iob2_spans(tag_entities(tokens, entities)) == iob2_spans(tags)


@pytest.mark.parametrize(
    ("tokens", "entities", "spans"),
    [
        (["a", "b", "a"], [("X", "a")], [("X", 0, 1)]),
        (["a", "b", "a"], [("X", "a"), ("Y", "a"), ("Z", "a")], [("X", 0, 1), ("Y", 2, 3)]),
        (["a", "b", "a"], [("Y", "b a"), ("X", "a b")], [("Y", 1, 3)]),
        (["Al", "-", "Zaman"], [("X", "Al-Zaman")], [("X", 0, 3)]),
        (["Al-", "Zaman"], [("X", "Zam"), ("X", "Al"), ("X", "al-Zaman")], []),
        (["a", "a", "b"], [("X", "a b")], [("X", 1, 3)]),
        (["a"], [("X", " "), ("X", "a a")], []),
        ([], [("X", "a")], []),
        (["北", "京"], [("X", "北京")], [("X", 0, 2)]),
    ],
    ids=range(9),
)
def test_each_entity_takes_the_first_free_place(
    tokens: list[str], entities: list[tuple[str, str]], spans: list[tuple[str, int, int]]
) -> None:
    assert iob2_spans(tag_entities(tokens, entities)) == spans
