"""Which files, which language, which rows."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from adaptermix.errors import DataError
from adaptermix.tasks import get_task
from adaptermix.tasks.data import find_files, parse_rows, read_pairs
from adaptermix.tasks.data.languages import languages_of

from ...refusals import refuses

read_slots = get_task("slots").read


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


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("en_pud-ud-test.iob2", "en"),
        ("ru_pud-ud-test.iob2", "ru"),
        ("tl_trg-ud-test.iob2", "fil"),
        ("sk_snk-ud-train.iob2.gz", "sk"),
        ("ceb_gja-ud-test.iob2", "ceb"),
        ("gsw_uzh-ud-test.iob2", "gsw"),
        ("kmr_mg-ud-test.iob2", "ku"),
        ("de.nlu.tsv", "de"),
        ("en.pos.tsv", "en"),
        ("de.bio.tsv", "de"),
        ("en.intent.fin.csv", "en"),
        ("deu.trg.tsv", "de"),
        ("my_data.de.tsv", "de"),
        ("de.no_dups.tsv", "de"),
        ("mlqa.de.de.json", "de"),
    ],
)
def test_treebanks_and_words_that_look_like_codes_do_not_hide_the_language(name: str, language: str) -> None:
    assert languages_of(Path(name)) == (language,)


@pytest.mark.parametrize("name", ["de.fr.tsv", "trg.gsw.tsv", "my_de_data.tsv"])
def test_of_several_codes_of_one_kind_none_is_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a\tO\n")
    assert languages_of(Path(name)) == ()
    with pytest.raises(DataError, match=r"given \(de=FILE\), and its name has '(de|trg|my)' and '(fr|gsw|de)'\.$"):
        read_slots([str(tmp_path / name)])
    with refuses("pairs.no-languages: , and its name has '"):
        read_pairs([str(tmp_path / name)])
    assert read_slots([f"de={tmp_path / name}"])[0][0].language == "de"


def test_an_unclear_name_does_not_matter_where_rows_tell_their_language(tmp_path: Path) -> None:
    (tmp_path / "my.it.jsonl").write_text('{"text": "a", "slots": [], "language": "de"}\n')
    assert read_slots([str(tmp_path / "my.it.jsonl")])[0][0].language == "de"


@pytest.mark.parametrize(
    ("name", "languages"),
    [
        ("zh-TW.test.jsonl", ("zh-Hant",)),
        ("zh_TW.txt", ("zh-Hant",)),
        ("zh-tw.txt", ("zh-Hant",)),
        ("zh-hant-tw.txt", ("zh-Hant",)),
        ("zho_Hant.dev", ("zh-Hant",)),
        ("zho-TW.txt.gz", ("zh-Hant",)),
        ("zh_hk-ud-test.iob2", ("zh-Hant",)),
        ("zh-CN.test.jsonl", ("zh",)),
        ("zho_Hans.dev", ("zh",)),
        ("zho-CN.txt.gz", ("zh",)),
        ("zh-Hans-TW.txt", ("zh",)),
        ("zho_Hant-eng_Latn.tsv", ("zh-Hant", "en")),
        ("en-zh_TW.tsv", ("en", "zh-Hant")),
        ("pt-BR-en.tsv", ("pt", "en")),
        ("en-tw.tsv", ("en", "ak")),
    ],
)
def test_traditional_chinese_is_a_language_of_its_own(name: str, languages: tuple[str, ...]) -> None:
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
    ("rows", "expected"),
    [
        (None, slice(None)),
        (":3", slice(None, 3)),
        ("5:", slice(5, None)),
        ("1:2", slice(1, 2)),
        ("::10", slice(None, None, 10)),
        ("1:9:2", slice(1, 9, 2)),
        ("4::", slice(4, None)),
    ],
)
def test_rows_are_a_slice(rows: str | None, expected: slice) -> None:
    assert parse_rows(rows) == expected


@pytest.mark.parametrize("rows", ["3", "a:b", "-1:", "1:2:3:4", "::0", "::-1", ""])
def test_other_forms_of_rows_are_refused(rows: str) -> None:
    with refuses("data.rows-option"):
        parse_rows(rows)


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.de.tsv").touch()
    for argument, message in [
        (str(tmp_path / "none.tsv"), "data.not-found"),
        (str(tmp_path / "empty.de.tsv"), "data.empty"),
        (str(tmp_path), "data.is-folder"),
    ]:
        with refuses(message) as caught:
            find_files([argument])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("x.txt", b"ok\n\xff\xfe\n"), ("x.txt.gz", b"no gzip at all")])
def test_broken_text_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with refuses(rf"data.not-utf8: {name}:\d+: "):
        list(find_files([str(path)])[0].lines())


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"line\n" * 5000)[:-20])
    with refuses("data.not-utf8"):
        list(find_files([str(path)])[0].lines())


@pytest.mark.parametrize(
    ("name", "languages"),
    [
        ("pt-BR.train.jsonl", ("pt",)),
        ("zh-cn.txt", ("zh",)),
        ("deu_Latn.dev", ("de",)),
        ("europarl-v7.de-en.tsv", ("de", "en")),
        ("cmn-yue.tsv", ("zh", "yue")),
        ("train.tsv.gz", ()),
        ("set.csv", ()),
        ("ner.jsonl", ()),
    ],
)
def test_scripts_regions_and_words_of_file_names_are_no_second_language(name: str, languages: tuple[str, ...]) -> None:
    assert languages_of(Path(name)) == languages


@pytest.mark.parametrize(
    ("given", "languages"),
    [
        ("de", ("de",)),
        ("deu", ("de",)),
        ("de-en", ("de", "en")),
        ("deu-eng", ("de", "en")),
        ("sr-Latn", ("sr",)),
        ("pt-BR", ("pt",)),
        ("zh-CN", ("zh",)),
        ("zh-cn", ("zh",)),
        ("zh-TW", ("zh-Hant",)),
        ("zh-tw", ("zh-Hant",)),
        ("zh-Hant", ("zh-Hant",)),
        ("zho_Hant", ("zh-Hant",)),
        ("zh-TW-en", ("zh-Hant", "en")),
        ("en-zh-Hant", ("en", "zh-Hant")),
    ],
)
def test_a_given_script_or_region_belongs_to_one_language(
    given: str, languages: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "data.tsv").write_text("a\tb\n")
    assert find_files([f"{given}={tmp_path / 'data.tsv'}"])[0].languages == languages


def test_a_given_language_holds_for_every_file_of_a_glob(tmp_path: Path) -> None:
    for name in ("de.1.txt", "fr.2.txt"):
        (tmp_path / name).write_text("x\n")
    assert [file.language for file in find_files([f"nl={tmp_path / '*.txt'}"])] == ["nl", "nl"]


def test_a_file_whose_own_name_looks_like_a_glob_or_a_given_language_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("de=x.txt", "[de].txt", "my_data=x.txt"):
        Path(name).write_text("x\n")
        assert find_files([name])[0].path == Path(name)
    assert find_files(["my_data=?.txt"])[0].path == Path("my_data=x.txt")


def test_a_glob_without_a_match_and_no_file_at_all_are_refused(tmp_path: Path) -> None:
    with refuses(r"data.not-found: nothing-\*\.tsv'"):
        find_files([str(tmp_path / "nothing-*.tsv")])
    with refuses("data.no-file"):
        find_files([])


@pytest.mark.parametrize("bad", [1, 2, 700, 5000])
@pytest.mark.parametrize("packed", [False, True])
def test_broken_text_is_refused_at_its_own_line(tmp_path: Path, bad: int, packed: bool) -> None:
    lines = [b"line of text\n"] * 5000
    lines[bad - 1] = b"caf\xe9\n"
    path = tmp_path / ("de.txt.gz" if packed else "de.txt")
    path.write_bytes(gzip.compress(b"".join(lines)) if packed else b"".join(lines))
    with pytest.raises(DataError, match=rf"{path.name}:{bad}: .*UTF-8") as caught:
        list(find_files([str(path)])[0].lines())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "checksum", "middle"])
def test_damaged_gzip_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    packed = bytearray(gzip.compress(bytes(range(33, 127)) * 400 + b"\n"))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "checksum":
        packed[-8] ^= 0xFF
    else:
        packed[10:40] = b"\xff" * 30
    path = tmp_path / "de.txt.gz"
    path.write_bytes(bytes(packed))
    with pytest.raises(DataError, match=r"de\.txt\.gz:\d+: ") as caught:
        list(find_files([str(path)])[0].lines())
    assert "\n" not in str(caught.value)


def test_only_line_feeds_end_lines_and_only_the_first_line_loses_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffa\u2028b\x85c\x0bd\n\ufeffe".encode())
    assert list(find_files([str(path)])[0].lines()) == [(1, "a\u2028b\x85c\x0bd"), (2, "\ufeffe")]


def test_a_manifest_entry_has_the_hash_of_the_file_as_it_lies_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "de.txt.gz"
    path.write_bytes(gzip.compress(b"eins\n"))
    assert find_files([str(path)])[0].entry() == {
        "name": "de.txt.gz",
        "languages": ["de"],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "text": hashlib.sha256(b"eins\n").hexdigest(),
    }


def test_a_language_before_the_file_must_be_a_code(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\tb\n")
    with refuses("data.language-code: 'klingon'"):
        find_files([f"klingon={tmp_path / 'x.tsv'}"])
    with refuses("data.not-found"):
        find_files([f"klingon={tmp_path / 'y.tsv'}"])
