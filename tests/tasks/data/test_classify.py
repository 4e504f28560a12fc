"""Labelled texts in every form, where their language stands, and refusals that name file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.tasks import get_task
from adaptermix.tasks.classify import ClassifyRow

from ...refusals import refuses
from .test_readers import PACKINGS, pack

read_classify = get_task("classify").read

FILES = {
    "de.tsv": "rot, hell\tpositive\n\ngrün\tnegative\n",
    "de.headed.tsv": "ID\tLabel\tText\n1\tpositive\trot, hell\n\n2\tnegative\tgrün\n",
    "de.csv": '"rot, hell",positive\n\ngrün,negative\n',
    "de.wide.csv": 'id,text,label,source\n1,"rot, hell",positive,x\n2,grün,negative,"y, z"\n',
    "de.named.csv": 'sentiment,tweet\npositive,"rot, hell"\nnegative,grün\n',
    "de.jsonl": '{"text": "rot, hell", "label": "positive", "id": 1}\n\n{"label": "negative", "text": "grün"}\n',
}
ROWS = [
    ClassifyRow(text="rot, hell", label="positive", language="de"),
    ClassifyRow(text="grün", label="negative", language="de"),
]


@PACKINGS
@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    rows, files = read_classify([pack(tmp_path / name, FILES[name], packing)])
    assert rows == ROWS
    assert files[0].language == "de"


def test_forms_without_a_telling_name_are_known_by_their_first_line(tmp_path: Path) -> None:
    for name in ("de.jsonl", "de.tsv"):
        path = pack(tmp_path / f"de.{len(name)}", FILES[name], "plain")
        assert read_classify([path])[0] == ROWS


def test_braces_in_a_table_are_text(tmp_path: Path) -> None:
    path = pack(tmp_path / "de.tsv", "{a}\t{b}\n", "plain")
    assert read_classify([path])[0] == [ClassifyRow(text="{a}", label="{b}", language="de")]


cells = (
    st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=9).map(str.strip).filter(bool)
)
labels = st.sampled_from(["gut", "schlecht", "so, so", 'er sagt "ja"', "0"])


@given(st.lists(st.tuples(cells, labels), min_size=1, max_size=5))
def test_csv_and_jsonl_give_back_any_text(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    expected = [ClassifyRow(text=text, label=label, language="de") for text, label in rows]
    with (folder / "de.every.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("text", "label"), *rows])
    (folder / "de.every.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8"
    )
    for name in ("de.every.csv", "de.every.jsonl"):
        assert read_classify([str(folder / name)])[0] == expected


class TestLanguage:
    def test_it_stands_in_the_row_before_the_name_and_is_given_before_both(self, tmp_path: Path) -> None:
        forms = {
            "en.tsv": "text\tlabel\tlanguage\na\tx\tdeu\nb\tx\tpt-BR\nc\tx\t\n",
            "en.jsonl": '{"text": "a", "label": "x", "language": "de"}\n{"text": "b", "label": "x", "lang": "pt-BR"}\n'
            '{"text": "c", "label": "x", "language": null}\n',
        }
        for name, text in forms.items():
            path = pack(tmp_path / name, text, "plain")
            assert [row.language for row in read_classify([path])[0]] == ["de", "pt", "en"]
            assert {row.language for row in read_classify([f"fr={path}"])[0]} == {"fr"}

    def test_it_is_the_folder_of_a_tree_such_as_that_of_nusax(self, tmp_path: Path) -> None:
        for folder in ("acehnese", "toba_batak", "english"):
            (tmp_path / folder).mkdir()
            pack(tmp_path / folder / "test.csv", "id,text,label\n1,a,x\n", "gz")
        rows, files = read_classify([str(tmp_path / "*" / "test.csv.gz")])
        assert [row.language for row in rows] == [file.language for file in files] == ["ace", "en", "bbc"]
        named = pack(tmp_path / "english" / "de.csv", "a,x\n", "plain")
        assert read_classify([named])[0][0].language == "de"
        given_too = str(tmp_path / "english" / "test.csv.gz")
        assert read_classify([f"nl={given_too}"])[0][0].language == "nl"

    @pytest.mark.parametrize("folder", ["ml", "cv", "sst", "german"])
    def test_other_folders_tell_no_language(self, tmp_path: Path, folder: str) -> None:
        (tmp_path / folder).mkdir()
        with refuses("data.no-language"):
            read_classify([pack(tmp_path / folder / "train.csv", "a,x\n", "plain")])


@pytest.mark.parametrize(("written", "label"), [(1, "1"), (0, "0"), (2.5, "2.5"), ("  x ", "x")])
def test_labels_are_text(tmp_path: Path, written: object, label: str) -> None:
    path = pack(tmp_path / "de.jsonl", json.dumps({"text": "a", "label": written}) + "\n", "plain")
    assert read_classify([path])[0][0].label == label


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("de.tsv", "a\tx\nnur eine\n", r"table.columns: de\.tsv:2: .*'nur eine'"),
        ("de.tsv", "1\ta\tx\n", r"table.columns: de\.tsv:1: .*found 3"),
        ("de.tsv", "id\ttext\tlabel\n1\ta\tx\n2\ta\n", r"table.columns: de\.tsv:3: .*found 2"),
        ("de.tsv", "text\tgold\na\tx\n", r"table.header: de\.tsv:1: .*'label'"),
        ("de.tsv", "words\tlabel\na\tx\n", r"table.header: de\.tsv:1: .*'text'"),
        ("de.tsv", "text\tlabel\tlabel\na\tx\ty\n", r"table.column-twice: de\.tsv:1: .*'label'"),
        ("de.tsv", " \tx\n \tx\n", r"row.missing-field: de\.tsv:1: .*text"),
        ("de.tsv", "b\t\n \tx\n", r"row.missing-field: de\.tsv:1: .*label"),
        ("de.csv", 'a,x\nb,"x\ny"\n', r"row.label-lines: de\.csv:3: .*found 'x\\ny'"),
        ("de.csv", 'a,"x\nb,y\n', r"table.quotes: de\.csv:2: "),
        ("de.csv", "text,label\n", "data.none-in-rows: has 0"),
        ("de.csv", "\n \n", "data.blank"),
        ("de.jsonl", '{"text": "", "label": "x"}\n{"text": "a"}\n', r"row.missing-field: de\.jsonl:1: .*text"),
        ("de.jsonl", '{"text": "a", "label": null}\n', "data.none-in-rows: has 1, 1"),
        ("de.jsonl", '{"text": ["a"], "label": "x"}\n', r"table.not-text: de\.jsonl:1: .*found list"),
        ("de.jsonl", '{"text": "a", "label": true}\n', r"table.not-text: de\.jsonl:1: .*found bool"),
        ("de.jsonl", "[1]\n", r"row.not-object: de\.jsonl:1: .*found list"),
        ("x.jsonl", '{"text": "a", "label": "x"}\n', "data.no-language"),
        ("de-en.tsv", "a\tx\n", "data.no-language"),
    ],
    ids=range(19),
)
def test_malformed_rows_are_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with refuses(message) as caught:
        read_classify([pack(tmp_path / name, text, "plain")])
    assert "\n" not in str(caught.value)


def test_a_first_row_that_looks_like_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "en.csv").write_text("comment,target\nfine,good\nso so,bad\nbetter,good\n")
    with refuses(r"row.header-like: en\.csv.*'comment'.*'target'"):
        read_classify([str(tmp_path / "en.csv")])


@pytest.mark.parametrize(
    "text",
    [
        "fine,good\nso so,bad\nbetter,good\n",  # the label occurs again
        "not fine,odd\nso so,bad\nbetter,bad\n",  # a sentence is no name of a column
        "fine,a\nso so,b\nbetter,c\n",  # labels are all different
        "text,label\ncomment,target\nfine,good\nso,good\n".replace("comment,target", "a comment,target"),
    ],
)
def test_rows_that_may_well_be_data_are(tmp_path: Path, text: str) -> None:
    (tmp_path / "en.csv").write_text(text)
    assert len(read_classify([str(tmp_path / "en.csv")])[0]) == 3


def test_rows_pick_from_each_file_without_its_header(tmp_path: Path) -> None:
    files = [pack(tmp_path / f"{code}.tsv", "text\tlabel\na\tx\nb\tx\nc\tx\n", "plain") for code in ("de", "en")]
    assert [(row.language, row.text) for row in read_classify(files, rows="1:2")[0]] == [("de", "b"), ("en", "b")]
    with refuses("data.none-in-rows: 3:.*3"):
        read_classify(files, rows="3:")
