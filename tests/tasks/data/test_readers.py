"""The readers of every form: the same rows whatever the packing, and refusals that name file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.tasks import get_task
from adaptermix.tasks.data import read_pairs, read_parallel
from adaptermix.tasks.slots import SlotRow

from ...refusals import refuses

read_slots = get_task("slots").read

SLOT_FILES = {
    "de.conll": (
        "# id = 1\n# text = rote Lampe an\n1\trote\tx\tB-colour\n2\tLampe\tx\tO\n3\tan\tx\tB-state\n\n\n1\tja\tx\tO\n"
    ),
    "de.tsv": "rote Lampe an\tB-colour O B-state\tx\n\nja\tO\tx\n",
    "de.massive.jsonl": (
        '{"annot_utt": "[colour : rote] Lampe [state : an]", "locale": "de-DE"}\n\n{"annot_utt": "ja"}\n'
    ),
}
SLOTS = [
    SlotRow(
        text="rote Lampe an",
        slots=(("colour", "rote"), ("state", "an")),
        language="de",
        tokens=("rote", "Lampe", "an"),
        tags=("colour", "O", "state"),
        starts=(0, 2),
    ),
    SlotRow(text="ja", slots=(), language="de", tokens=("ja",), tags=("O",)),
]
PAIR_FILES = {
    "de-en.tsv": "rot\tred\n\ngrün, hell\tlight green\textra\n",
    "de-en.csv": 'rot,red\n\n"grün, hell",light green,extra\n',
    "de-en.jsonl": '{"source": "rot", "target": "red"}\n\n{"source": "grün, hell", "target": "light green"}\n',
}


def pack(path: Path, text: str, packing: str) -> str:
    if packing == "crlf":
        text = text.replace("\n", "\r\n")
    data = ("\ufeff" if packing == "mark" else "").encode() + text.encode()
    if packing == "gz":
        path = path.with_name(path.name + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data.removesuffix(b"\n") if packing == "unended" else data)
    return str(path)


PACKINGS = pytest.mark.parametrize("packing", ["plain", "gz", "crlf", "mark", "unended"])


@PACKINGS
@pytest.mark.parametrize("name", SLOT_FILES)
def test_slot_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    rows, files = read_slots([pack(tmp_path / name, SLOT_FILES[name], packing)])
    assert rows == SLOTS
    assert files[0].language == "de"


@PACKINGS
@pytest.mark.parametrize("name", PAIR_FILES)
def test_pairs_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    pairs, _ = read_pairs([pack(tmp_path / name, PAIR_FILES[name], packing)])
    assert [(pair.source, pair.target) for pair in pairs] == [("rot", "red"), ("grün, hell", "light green")]


@PACKINGS
def test_parallel_texts_are_the_same_in_every_packing(tmp_path: Path, packing: str) -> None:
    files = [pack(tmp_path / f"{code}.txt", f"{code} 1\n{code} 2\n", packing) for code in ("deu", "eng")]
    assert read_parallel(files).texts == {"de": ["deu 1", "deu 2"], "en": ["eng 1", "eng 2"]}


class TestPairs:
    def test_cells_in_quotes_may_hold_commas_quotes_and_line_breaks(self, tmp_path: Path) -> None:
        path = pack(tmp_path / "de-en.csv", '"a, ""b""",c\n"d\ne",f\n', "plain")
        assert [pair.source for pair in read_pairs([path])[0]] == ['a, "b"', "d\ne"]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("de-en.csv", 'a,"b\nc,d\ne,f\n', r"table.quotes: de-en\.csv.*3"),
            ("de-en.csv", 'a,"' + "x" * 140_000 + '"\n', r"table.quotes: de-en\.csv.*1.*field limit"),
            ("de-en.csv", "a,b\nnur eine\n", r"pairs.one-column: de-en\.csv.*2"),
            (
                "de-en.jsonl",
                '{"source": "a", "target": "b"}\n{"source": ["a"], "target": "b"}\n',
                "pairs.not-text: jsonl.*2",
            ),
            ("de-en.jsonl", "[1, 2]\n", "row.not-object: jsonl.*1.*list"),
            ("de-en.jsonl", '{"source": "a"}\n', "pairs.fields: jsonl.*1"),
            ("en.tsv", "a\tb\n", "pairs.no-languages"),
            ("de-en.tsv", "\n\n", "pairs.none-in-rows: 0"),
            ("de-en.tsv", " \tb\na\t \n", "pairs.none-in-rows: all.*2"),
        ],
        ids=range(9),
    )
    def test_malformed_pairs_are_refused_in_one_line(self, tmp_path: Path, name: str, text: str, message: str) -> None:
        with refuses(message) as caught:
            read_pairs([pack(tmp_path / name, text, "plain")])
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("header", ["German,English", "de,en", "deu,eng", "source,target"])
    def test_a_header_of_the_two_languages_is_no_pair(self, tmp_path: Path, header: str) -> None:
        path = pack(tmp_path / "de-en.csv", f"{header}\nHallo,Hello\n", "plain")
        assert [pair.source for pair in read_pairs([path])[0]] == ["Hallo"]
        other = pack(tmp_path / "fr-en.csv", f"{header}\nHallo,Hello\n", "plain")
        assert len(read_pairs([other])[0]) == (1 if header == "source,target" else 2)

    def test_sides_may_have_the_names_of_their_languages(self, tmp_path: Path) -> None:
        path = pack(tmp_path / "de-en.jsonl", '{"en": "Hello", "de": "Hallo"}\n', "plain")
        assert [(pair.source, pair.target) for pair in read_pairs([path])[0]] == [("Hallo", "Hello")]
        lacking = pack(tmp_path / "fr-en.jsonl", '{"en": "Hello", "de": "Hallo"}\n', "plain")
        with refuses("pairs.fields: 'fr' and 'en'.*'en', 'de'"):
            read_pairs([lacking])

    def test_one_foreign_language_in_the_name_stands_for_a_pair_with_english(self, tmp_path: Path) -> None:
        pairs, _ = read_pairs([pack(tmp_path / "swa.tsv", "moja\tone\n", "plain")])
        assert pairs[0].languages == ("sw", "en")


class TestParallel:
    def test_a_direction_that_two_files_give_is_refused_rather_than_overwritten(self, tmp_path: Path) -> None:
        files = [pack(tmp_path / name, "a\tb\n", "plain") for name in ("de-en.tsv", "en-de.tsv")]
        with refuses("parallel.directions: de-en, en-de"):
            read_parallel(files)

    def test_two_sides_of_one_language_are_refused_rather_than_mixed(self, tmp_path: Path) -> None:
        with refuses("pairs.same-language"):
            read_parallel([pack(tmp_path / "de-de.tsv", "a\tb\n", "plain")])

    def test_lines_that_are_blank_in_one_text_are_left_out_of_all(self, tmp_path: Path) -> None:
        files = [
            pack(tmp_path / "de.txt", "a\n\nb\nc\n", "plain"),
            pack(tmp_path / "fr.txt", "d\ne\n \nf\n", "plain"),
        ]
        assert read_parallel(files).texts == {"de": ["a", "c"], "fr": ["d", "f"]}
        assert read_parallel(files, rows=":2").texts == {"de": ["a"], "fr": ["d"]}
        with refuses("parallel.no-lines"):
            read_parallel(files, rows="1:3")

    def test_a_language_that_occurs_twice_or_alone_is_refused(self, tmp_path: Path) -> None:
        one, two = (pack(tmp_path / name, "a\n", "plain") for name in ("de.1.txt", "deu.2.txt"))
        with refuses("parallel.language-twice: de"):
            read_parallel([one, two])
        with refuses("parallel.line-count"):
            read_parallel([one])

    def test_rows_beyond_the_end_are_refused(self, tmp_path: Path) -> None:
        files = [pack(tmp_path / f"{code}.txt", "a\n", "plain") for code in ("de", "en")]
        with refuses("parallel.no-lines: 1"):
            read_parallel(files, rows="5:")

    def test_files_of_one_pair_are_joined(self, tmp_path: Path) -> None:
        files = [pack(tmp_path / f"de-en.{part}.tsv", f"a{part}\tb{part}\n", "plain") for part in (1, 2)]
        assert read_parallel(files).texts == {"de-en:de": ["a1", "a2"], "de-en:en": ["b1", "b2"]}


class TestSlots:
    @pytest.mark.parametrize("tag", ["X", "E-when", "S-when", "when", "b-when", "B-"])
    @pytest.mark.parametrize("form", ["plain", "conll"])
    def test_tags_of_other_schemes_are_refused(self, tmp_path: Path, tag: str, form: str) -> None:
        plain = f"a b\tO O\tx\na b\tO {tag}\tx\n"
        conll = f"# text = a b\n1\ta\tx\tO\n2\tb\tx\t{tag}\n"
        path = tmp_path / ("en.tsv" if form == "plain" else "en.conll")
        path.write_text(plain if form == "plain" else conll)
        line = {"plain": 2, "conll": 3}[form]
        with refuses(rf"row.tag: :{line}: .*'{tag}'"):
            read_slots([str(path)])

    def test_tags_that_begin_with_o_are_outside_and_never_a_slot(self, tmp_path: Path) -> None:
        """The English training set of xSID holds `Orecurring_datetime` 330 times, always behind a real span."""
        text = "at 11pm , every day\tO B-when Owhen O O\tx\nfoo bar\tO B-a\tx\n"
        rows, _ = read_slots([pack(tmp_path / "en.tsv", text, "plain")])
        assert [row.slots for row in rows] == [(("when", "11pm"),), (("a", "bar"),)]
        assert rows[0].tags == ("O", "when", "O", "O", "O")

    @given(st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b", "Oa"]), min_size=1, max_size=9))
    def test_spans_are_those_of_a_walk_over_the_tags(
        self, tmp_path_factory: pytest.TempPathFactory, bio: list[str]
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "walk.en.tsv"
        tokens = [f"t{i}" for i in range(len(bio))]
        path.write_text(f"{' '.join(tokens)}\t{' '.join(bio)}\n")
        expected: list[tuple[str, str]] = []
        inside = None
        for token, tag in zip(tokens, bio, strict=True):
            kind = tag[2:] if tag[1:2] == "-" else None
            if kind and tag[0] == "I" and inside == kind:
                expected[-1] = (kind, f"{expected[-1][1]} {token}")
            elif kind:
                expected.append((kind, token))
            inside = kind
        row = read_slots([str(path)])[0][0]
        assert list(row.slots) == expected
        assert row.tags == tuple(tag[2:] if tag[1:2] == "-" else "O" for tag in bio)

    def test_words_are_annotated_and_characters_counted_in_chinese(self, tmp_path: Path) -> None:
        text = "# text = 明天 play Jazz\n1\t明天\tx\tB-date\n2\tplay\tx\tO\n3\tJazz\tx\tB-genre\n"
        row = read_slots([pack(tmp_path / "zh.conll", text, "plain")])[0][0]
        assert row.tokens == ("明", "天", "play", "Jazz")
        assert row.tags == ("date", "date", "O", "genre")
        assert row.slots == (("date", "明天"), ("genre", "Jazz"))

    def test_spans_of_unspaced_text_are_joined_as_they_stand_in_it(self, tmp_path: Path) -> None:
        text = "# text = 明日の朝\n1\t明日\tx\tB-date\n2\tの\tx\tI-date\n3\t朝\tx\tI-date\n"
        assert read_slots([pack(tmp_path / "ja.conll", text, "plain")])[0][0].slots == (("date", "明日の朝"),)

    @pytest.mark.parametrize(
        ("named", "language"), [("deu", "de"), ("de-DE", "de"), ("cmn", "zh"), ("klingon", "klingon")]
    )
    def test_a_field_names_the_language_as_a_file_name_would(self, tmp_path: Path, named: str, language: str) -> None:
        row = {"text": "a", "slots": [], "language": named}
        assert read_slots([pack(tmp_path / "x.jsonl", json.dumps(row) + "\n", "plain")])[0][0].language == language

    def test_numbers_are_text_and_null_is_no_slot(self, tmp_path: Path) -> None:
        row = {"text": "a", "slots": [{"type": "n", "value": 5}]}
        path = pack(tmp_path / "de.jsonl", json.dumps(row) + "\n", "plain")
        assert read_slots([path])[0][0].slots == (("n", "5"),)
        for bad in (row | {"text": []}, row | {"slots": [{"type": "n", "value": None}]}, row | {"slots": None}):
            path = pack(tmp_path / "de.jsonl", json.dumps(row) + "\n" + json.dumps(bad) + "\n", "plain")
            with refuses(r"slots.json: de\.jsonl.*2"):
                read_slots([path])

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("de.jsonl", '{"annot_utt": "a"}\n{"utt": "a"}\n', r"slots.massive: de\.jsonl.*2"),
            ("de.jsonl", '{"text": "a", "slots": []}\n[]\n', r"row.not-object: de\.jsonl.*2.*list"),
            ("x.jsonl", '{"text": "a", "slots": []}\n', "data.no-language"),
            ("x.jsonl", '{"annot_utt": "a"}\n', "data.no-language"),
            ("x.conll", "1\ta\tx\tO\n", "data.no-language"),
            ("de.tsv", "a\tO\n\nb\tO O\n", r"slots.tag-count: de\.tsv.*3.*1.*2"),
            ("de.tsv", "a\tO\nb\n", r"slots.tag-count: de\.tsv.*2.*1.*0"),
            ("de-en.tsv", "a\tO\n", "data.no-language"),
        ],
        ids=range(8),
    )
    def test_malformed_rows_are_refused_at_their_line(self, tmp_path: Path, name: str, text: str, message: str) -> None:
        with refuses(message) as caught:
            read_slots([pack(tmp_path / name, text, "plain")])
        assert "\n" not in str(caught.value)

    def test_rows_pick_from_each_file_and_must_be_there(self, tmp_path: Path) -> None:
        files = [pack(tmp_path / f"{code}.tsv", "a\tO\nb\tO\nc\tO\n", "plain") for code in ("de", "en")]
        assert [(row.language, row.text) for row in read_slots(files, rows="1:2")[0]] == [("de", "b"), ("en", "b")]
        with refuses("data.none-in-rows: 3:.*3"):
            read_slots(files, rows="3:")
