"""Rows to translate, from each of the three kinds of files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.errors import DataError
from adaptermix.tasks import get_task
from adaptermix.tasks.translate import TranslateRow

from ...refusals import refuses
from .test_readers import PACKINGS, PAIR_FILES, pack

read_translations = get_task("translate").read


def write(folder: Path, **texts: str) -> list[str]:
    """Write files whose names have `__` for a hyphen and `_` for a stop; return their paths in order."""
    paths = [folder / name.replace("__", "-").replace("_", ".") for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in paths]


def plain(rows: list[TranslateRow]) -> list[tuple[str, str, str]]:
    return [(f"{row.source_language}-{row.target_language}", row.source, row.target) for row in rows]


@PACKINGS
@pytest.mark.parametrize("name", PAIR_FILES)
def test_pair_files_are_read_from_the_first_language_into_the_second(tmp_path: Path, name: str, packing: str) -> None:
    rows, files = read_translations([pack(tmp_path / name, PAIR_FILES[name], packing)])
    assert plain(rows) == [("de-en", "rot", "red"), ("de-en", "grün, hell", "light green")]
    assert files[0].languages == ("de", "en")


@PACKINGS
def test_texts_are_joined_line_by_line_in_every_packing(tmp_path: Path, packing: str) -> None:
    files = [pack(tmp_path / f"train.{code}", f"{code} 1\n{code} 2\n", packing) for code in ("cs", "en")]
    assert plain(read_translations(files)[0]) == [("cs-en", "cs 1", "en 1"), ("cs-en", "cs 2", "en 2")]
    assert plain(read_translations(files[::-1])[0]) == [("en-cs", "en 1", "cs 1"), ("en-cs", "en 2", "cs 2")]


def test_each_of_many_texts_is_translated_into_those_after_it(tmp_path: Path) -> None:
    write(tmp_path, val_fr="f\n", val_de="d\n", val_en="e\n")
    rows, files = read_translations([str(tmp_path / "val.*")])
    assert plain(rows) == [("de-en", "d", "e"), ("de-fr", "d", "f"), ("en-fr", "e", "f")]
    assert len(files) == 3


@pytest.mark.parametrize(
    ("source", "reference"),
    [
        ("en-de.src.en", "en-de.ref.de"),
        ("en-de.src.en.gz", "en-de.ref.de.gz"),
        ("generaltest2023.en-de.src.en", "generaltest2023.en-de.ref.refA.de"),
        ("x.en-de.src.txt", "x.en-de.ref.txt"),
        ("en-de.src", "en-de.ref.de.txt.gz"),
    ],
)
def test_sources_and_references_are_joined_in_any_order(tmp_path: Path, source: str, reference: str) -> None:
    for name, text in ((source, "a\nb\n"), (reference, "A\nB\n")):
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for names in ([source, reference], [reference, source]):
        rows, _ = read_translations([str(tmp_path / name) for name in names])
        assert plain(rows) == [("en-de", "a", "A"), ("en-de", "b", "B")]


def test_a_folder_of_several_pairs_is_sorted_out(tmp_path: Path) -> None:
    write(tmp_path, en__de_src_en="a\n", en__de_ref_de="A\n", zh__en_src_zh="c\n", zh__en_ref_en="C\n")
    assert plain(read_translations([str(tmp_path / "*")])[0]) == [("en-de", "a", "A"), ("zh-en", "c", "C")]


def test_pair_files_whose_names_hold_src_are_pair_files(tmp_path: Path) -> None:
    files = write(tmp_path, de__en_src_tsv="a\tb\n", de__en_ref_jsonl='{"source": "c", "target": "d"}\n')
    assert plain(read_translations(files)[0]) == [("de-en", "a", "b"), ("de-en", "c", "d")]


def test_kinds_may_be_mixed(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        x_de="a\n",
        x_en="b\n",
        cs__en_tsv="c\td\n",
        en__is_src_en="e\n",
        en__is_ref_is="f\n",
        swa_tsv="g\th\n",
    )
    assert sorted(plain(read_translations(files)[0])) == [
        ("cs-en", "c", "d"),
        ("de-en", "a", "b"),
        ("en-is", "e", "f"),
        ("sw-en", "g", "h"),
    ]


def test_given_languages_win_over_names(tmp_path: Path) -> None:
    one, two, three, source, reference = write(
        tmp_path, a_txt="a\n", b_txt="b\n", en__de_tsv="c\td\n", en__de_src_en="e\n", en__de_ref_de="f\n"
    )
    rows, _ = read_translations([f"fr={one}", f"it={two}", f"de-en={three}"])
    assert plain(rows) == [("de-en", "c", "d"), ("fr-it", "a", "b")]
    # a set that has its pair the wrong way round
    assert plain(read_translations([f"de-en={source}", f"de-en={reference}"])[0]) == [("de-en", "e", "f")]


def test_rows_with_an_empty_side_are_left_out_and_count_as_rows(tmp_path: Path) -> None:
    files = write(tmp_path, x_de="a\n\nc\nd\n", x_en="A\nB\n \nD\n")
    assert [row.source for row in read_translations(files)[0]] == ["a", "d"]
    assert [row.source for row in read_translations(files, rows="1:")[0]] == ["d"]
    with refuses(r"translate.no-lines: x\.de.*1:3.*4"):
        read_translations(files, rows="1:3")


def test_rows_pick_from_each_file(tmp_path: Path) -> None:
    files = write(tmp_path, x_de="a\nb\nc\n", x_en="A\nB\nC\n", cs__en_tsv="d\tD\ne\tE\n")
    assert sorted(row.source for row in read_translations(files, rows="1:2")[0]) == ["b", "e"]


def test_line_breaks_in_cells_become_blanks(tmp_path: Path) -> None:
    files = write(tmp_path, de__en_jsonl=json.dumps({"source": "a \r\n\n b", "target": "c\nd\u2028e"}) + "\n")
    assert plain(read_translations(files)[0]) == [("de-en", "a b", "c d\u2028e")]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"x_de": "a\nb\n", "x_en": "A\nB\nC\n"}, r"translate.line-count: x\.en.*3.*2.*3"),
        ({"x_de": "a\nb\nc\n", "x_en": "A\n"}, r"translate.line-count: x\.de.*2"),
        ({"x_de": "a\n"}, r"translate.one-language: x\.de.*de"),
        ({"x_de": "a\n", "y_de": "b\n"}, r"translate.language-twice: y\.de.*de"),
        ({"x_de": " \n\n", "x_en": "\n\n"}, "translate.no-lines: all.*2"),
        ({"de__en_tsv": "a\tb\nc\n"}, r"pairs.one-column: de-en\.tsv.*2"),
        ({"de__en_jsonl": '{"source": "a", "target": "b"}\n{"a": 1}\n'}, "pairs.fields: jsonl.*2"),
        ({"x_tsv": "a\tb\n"}, r"pairs.no-languages: x\.tsv"),
        ({"en__de_src_en": "a\n"}, r"translate.no-side: src\.en.*ref"),
        ({"en__de_ref_de": "a\n"}, r"translate.no-side: ref\.de.*src"),
        ({"en__de_src_en": "a\n", "en__de_ref_de": "b\nc\n"}, r"translate.line-count: ref\.de.*2"),
        ({"en__de_src_de": "a\n", "en__de_ref_en": "b\n"}, r"translate.side-language: src\.de.*en.*de"),
        ({"en__de_src_en": "a\n", "en__de_ref_fr": "b\n"}, r"translate.side-language: ref\.fr.*de.*fr"),
        (
            {"en__de_src_en": "a\n", "en__de_ref_A_de": "b\n", "en__de_ref_B_de": "c\n"},
            r"translate.side-twice: B\.de.*reference",
        ),
        ({"en__xq_src_en": "a\n", "en__xq_ref_xq": "b\n"}, "translate.no-languages"),
    ],
    ids=range(15),
)
def test_malformed_files_are_refused_in_one_line(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    with refuses(message) as caught:
        read_translations(write(tmp_path, **texts))
    assert "\n" not in str(caught.value)


def test_sides_given_as_different_pairs_or_one_language_are_refused(tmp_path: Path) -> None:
    source, reference = write(tmp_path, en__de_src_en="a\n", en__de_ref_de="b\n")
    with refuses(r"translate.other-pair: ref\.de.*en-de"):
        read_translations([source, f"en-fr={reference}"])
    with refuses("translate.same-language: de"):
        read_translations([f"de-de={source}", f"de-de={reference}"])


lines = st.lists(st.tuples(*[st.text(alphabet="ab \u00e4\u65e5", max_size=5)] * 2), min_size=1, max_size=8)


@given(lines)
def test_texts_and_pairs_give_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    kept = [("de-en", one.strip(), two.strip()) for one, two in rows if one.strip() and two.strip()]
    texts = write(
        folder, same_de="".join(one + "\n" for one, _ in rows), same_en="".join(two + "\n" for _, two in rows)
    )
    pairs = write(folder, same_de__en_tsv="".join(f"{one}\t{two}\n" for one, two in rows))
    for files in (texts, pairs):
        if kept:
            assert plain(read_translations(files)[0]) == kept
        else:
            with pytest.raises(DataError, match=r"must h(old|ave)"):
                read_translations(files)
