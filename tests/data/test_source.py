"""Which files, which language, which rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from adaptermix.data import find_files, parse_rows
from adaptermix.data.source import languages_of
from adaptermix.errors import DataError


@pytest.mark.parametrize(
    ("name", "languages"),
    [
        ("deu-eng.tsv.gz", ("de", "en")),
        ("cmn-eng.tsv", ("zh", "en")),
        ("pairs.de-en.tsv", ("de", "en")),
        ("de-en.src.de.gz", ("de", "en")),
        ("en.train.tsv.gz", ("en",)),
        ("train.de.jsonl", ("de",)),
        ("test_2016_flickr.cs.gz", ("cs",)),
        ("gsw.valid.conll.gz", ("gsw",)),
        ("srp-Latn.txt.gz", ("sr",)),
        ("xquad.tr.json.gz", ("tr",)),
        ("dev.tsv", ()),
        ("commands.jsonl", ()),
    ],
)
def test_the_language_is_read_from_the_name(name: str, languages: tuple[str, ...]) -> None:
    assert languages_of(Path(name)) == languages


def test_a_given_language_wins_over_the_name(tmp_path: Path) -> None:
    path = tmp_path / "de.tsv"
    path.write_text("a\tb\n")
    assert find_files([f"deu-eng={path}"])[0].languages == ("de", "en")
    assert find_files([f"tr={path}"])[0].languages == ("tr",)


def test_globs_are_resolved_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("x\n")
    assert [file.path.name for file in find_files([str(tmp_path / "*.txt")])] == ["a.txt", "b.txt"]


def test_gzip_and_byte_order_marks_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress("\ufeffeins\r\nzwei\r\n".encode()))
    assert list(find_files([str(path)])[0].lines()) == [(1, "eins"), (2, "zwei")]


@pytest.mark.parametrize(
    ("rows", "expected"), [(None, slice(None)), (":3", slice(None, 3)), ("5:", slice(5, None)), ("1:2", slice(1, 2))]
)
def test_rows_are_a_slice(rows: str | None, expected: slice) -> None:
    assert parse_rows(rows) == expected


@pytest.mark.parametrize("rows", ["3", "a:b", "-1:", "1:2:3", ""])
def test_other_forms_of_rows_are_refused(rows: str) -> None:
    with pytest.raises(DataError, match="START:STOP"):
        parse_rows(rows)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.de.tsv").touch()
    for argument, message in [
        (str(tmp_path / "none.tsv"), "must exist"),
        (str(tmp_path / "empty.de.tsv"), "is empty"),
        (str(tmp_path), "is a folder"),
        ("hf:owner/name", "not read yet"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            find_files([argument])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("x.txt", b"ok\n\xff\xfe\n"), ("x.txt.gz", b"no gzip at all")])
def test_broken_text_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}:\d+: .*UTF-8"):
        list(find_files([str(path)])[0].lines())


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"line\n" * 5000)[:-20])
    with pytest.raises(DataError, match="UTF-8"):
        list(find_files([str(path)])[0].lines())
