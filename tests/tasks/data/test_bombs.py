"""Files that would fill the memory are refused early, and rows behind the last one asked for are not read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix.errors import DataError
from adaptermix.options import EvaluateSettings
from adaptermix.tasks import get_task
from adaptermix.tasks.data import files as source
from adaptermix.tasks.data import find_files
from adaptermix.tasks.data.pairs import read_pairs
from adaptermix.tasks.data.parallel import read_parallel
from adaptermix.tasks.data.texts import texts_of

from ...refusals import refuses

read_classify = get_task("classify").read
read_qa = get_task("qa").read


LINES = "".join(f"a text of row {number}\tyes\n" for number in range(4))


@pytest.mark.parametrize("line", [b"\n", b"a\tb\n", b"x", b"\0"], ids=["blank", "rows", "one line", "zeros"])
def test_a_compressed_bomb_is_refused_before_it_is_unpacked(
    line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FEW_BYTES", 2**17)
    monkeypatch.setattr(source, "MOST_LINE", 2**18)
    path = tmp_path / "en.train.tsv.gz"
    path.write_bytes(gzip.compress(line * (2**22 // len(line)), compresslevel=9))
    assert path.stat().st_size < 2**22 / source.MOST_EXPANSION
    (data,) = find_files([str(path)])
    read = 0
    lines = data.lines()
    with pytest.raises(DataError, match=r"must not be more than 200 times|must have at most 262,144 bytes"):  # noqa: PT012
        while True:
            read += len(next(lines)[1]) + 1
    assert read <= max(2**17, source.MOST_EXPANSION * path.stat().st_size)


def test_a_text_that_is_short_or_compressed_as_texts_are_is_read(tmp_path: Path) -> None:
    path = tmp_path / "en.train.tsv.gz"
    path.write_bytes(gzip.compress(b"the same text\tyes\n" * 50_000))
    assert 100 * path.stat().st_size < 900_000  # rows that repeat, but few of them
    assert len(read_classify([str(path)])[0]) == 50_000


@pytest.mark.parametrize("name", ["en.train.tsv", "en.train.jsonl", "en.json", "en.train.tsv.gz"])
def test_a_line_without_an_end_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MOST_LINE", 1000)
    path = tmp_path / name
    content = LINES.encode() + b"x" * 1001
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with refuses(rf"data.long-line: {name}:5: .*1,000"):
        list(find_files([str(path)])[0].lines())
    content = LINES.encode() + b"y" * 999 + b"\n"
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert len(list(find_files([str(path)])[0].lines())) == 5


def test_rows_behind_the_last_one_asked_for_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "en.train.tsv"
    path.write_bytes(LINES.encode() + b"\xff no text, and no row\n")
    rows, _ = read_classify([str(path)], rows="0:3")
    assert [row.text for row in rows] == [f"a text of row {number}" for number in range(3)]
    with refuses("data.not-utf8"):
        read_classify([str(path)], rows="3:")
    pairs = tmp_path / "de-en.tsv"
    pairs.write_bytes("".join(f"de {n}\ten {n}\n" for n in range(4)).encode() + b"\xff\n")
    assert [pair.source for pair in read_pairs([str(pairs)], rows="1:4:2")[0]] == ["de 1", "de 3"]


@pytest.mark.parametrize("content", ['{"text": %s, "label": "a"}', '{"text": "a", "label": %s}', "%s"])
def test_numbers_of_thousands_of_digits_are_refused_in_a_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "en.train.jsonl"
    path.write_text(content % ("9" * 5_000) + "\n")
    with refuses(r"row.not-json: en\.train\.jsonl.*1") as caught:
        read_classify([str(path)])
    assert len(str(caught.value)) < 300
    questions = tmp_path / "en.json"
    questions.write_text(json.dumps({"data": [{"paragraphs": []}]})[:-1] + ', "version": ' + "9" * 5_000 + "}")
    with refuses("qa.too-deep"):
        read_qa([str(questions)])


@pytest.mark.parametrize("rows", ["0:" + "9" * 5_000, "9" * 5_000 + ":", "::" + "9" * 5_000, "0:" + "0" * 5_000])
def test_rows_of_thousands_of_digits_are_wrong_usage(rows: str) -> None:
    given: dict[str, Any] = {"base": "b", "task": "classify", "data": ["x"], "rows": rows}
    with refuses("option.rows"):
        EvaluateSettings(**given)


def test_a_row_that_is_nested_too_deep_to_be_cleaned_is_told_with_its_line(tmp_path: Path) -> None:
    row = '{"text": "a\\ud83d", "label": "x", "more": ' + "[" * 600 + "]" * 600 + "}\n"
    (tmp_path / "en.jsonl").write_text('{"text": "b", "label": "y"}\n' + row)
    with refuses(r"row.not-json: en\.jsonl.*2"):
        list(source.DataFile(path=tmp_path / "en.jsonl", languages=()).json_rows())


@pytest.mark.parametrize("name", ["de.txt", "de.jsonl"])
def test_texts_behind_the_last_row_asked_for_are_not_read(name: str, tmp_path: Path) -> None:
    line = b'{"text": "a"}\n' if name.endswith("jsonl") else b"a\n"
    path = tmp_path / name
    path.write_bytes(line * 3 + b"\xff\n")  # reading this line fails
    assert texts_of([str(path)], rows="0:3")[0] == ["a"]
    with refuses("data.not-utf8"):
        texts_of([str(path)], rows="0:4")


def test_lines_behind_the_last_row_asked_for_are_counted_only(tmp_path: Path) -> None:
    for language, lines in (("de", 5), ("en", 5), ("fr", 6)):
        (tmp_path / f"{language}.txt").write_text("".join(f"{language} {n}\n" for n in range(lines)))
    paths = {language: str(tmp_path / f"{language}.txt") for language in ("de", "en", "fr")}
    assert read_parallel([paths["de"], paths["en"]], rows="1:2").texts == {"de": ["de 1"], "en": ["en 1"]}
    with refuses("parallel.line-count"):
        read_parallel([paths["de"], paths["fr"]], rows="1:2")
