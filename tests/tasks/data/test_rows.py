"""Rows of pair files, parallel texts and slot files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.tasks import get_task
from adaptermix.tasks.data import read_pairs, read_parallel
from adaptermix.tasks.tagged import split_tokens

from ...refusals import refuses

read_slots = get_task("slots").read


def put(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


class TestPairs:
    def test_tsv_csv_and_jsonl_give_the_same_pairs(self, tmp_path: Path) -> None:
        rows = [("guten Tag, Welt", "good day, world"), ("ja", "yes")]
        forms = {
            "de-en.tsv": "".join(f"{a}\t{b}\n" for a, b in rows),
            "de-en.csv": "".join(f'"{a}","{b}"\n' for a, b in rows),
            "de-en.jsonl": "".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in rows),
            "de-en.2.jsonl": "".join(json.dumps({"text_parallel_0": a, "text_parallel_1": b}) + "\n" for a, b in rows),
        }
        for name, text in forms.items():
            pairs, _ = read_pairs([put(tmp_path, name, text)])
            assert [(pair.source, pair.target) for pair in pairs] == rows
            assert pairs[0].languages == ("de", "en")

    def test_one_column_is_refused_with_file_and_line(self, tmp_path: Path) -> None:
        path = put(tmp_path, "de-en.tsv", "a\tb\nnur eine\n")
        with refuses(r"pairs.one-column: de-en\.tsv.*2.*'nur eine'"):
            read_pairs([path])

    def test_more_than_two_columns_are_refused(self, tmp_path: Path) -> None:
        with refuses(r"pairs.columns: de-en\.tsv.*1.*4"):
            read_pairs([put(tmp_path, "de-en.tsv", "1\thallo\t2\thello\n")])

    def test_a_name_without_languages_is_refused(self, tmp_path: Path) -> None:
        with refuses("pairs.no-languages"):
            read_pairs([put(tmp_path, "pairs.tsv", "a\tb\n")])

    def test_rows_pick_from_every_file_and_empty_sides_are_left_out(self, tmp_path: Path) -> None:
        one = put(tmp_path, "de-en.tsv", "a\tb\nc\t \ne\tf\n")
        two = put(tmp_path, "fr-en.tsv", "g\th\ni\tj\nk\tl\n")
        pairs, _ = read_pairs([one, two], rows=":2")
        assert [pair.source for pair in pairs] == ["a", "g", "i"]

    def test_a_range_without_rows_is_refused(self, tmp_path: Path) -> None:
        with refuses("pairs.none-in-rows: 1"):
            read_pairs([put(tmp_path, "de-en.tsv", "a\tb\n")], rows="5:")

    def test_broken_json_is_refused_with_its_line(self, tmp_path: Path) -> None:
        with refuses("row.not-json: 2"):
            read_pairs([put(tmp_path, "de-en.jsonl", '{"source": "a", "target": "b"}\n{"source"\n')])


class TestParallel:
    def test_texts_per_language_give_all_directions(self, tmp_path: Path) -> None:
        files = [put(tmp_path, f"{code}.txt", f"{code} 1\n{code} 2\n") for code in ("de", "en", "fr")]
        parallel = read_parallel(files)
        assert sorted(name for name, _, _ in parallel.directions) == [
            "de-en",
            "de-fr",
            "en-de",
            "en-fr",
            "fr-de",
            "fr-en",
        ]
        assert parallel.texts["de"] == ["de 1", "de 2"]

    def test_both_scripts_of_chinese_are_taken_side_by_side(self, tmp_path: Path) -> None:
        files = [put(tmp_path, f"{code}.dev", "a\n") for code in ("zho_Hans", "zho_Hant", "eng_Latn")]
        assert list(read_parallel(files).texts) == ["zh", "zh-Hant", "en"]
        with refuses("parallel.language-twice: zh"):
            read_parallel([*files, put(tmp_path, "zh-CN.txt", "a\n")])

    def test_texts_of_different_length_are_refused(self, tmp_path: Path) -> None:
        files = [put(tmp_path, "de.txt", "a\n"), put(tmp_path, "en.txt", "a\nb\n")]
        with refuses("parallel.line-count: de 1, en 2"):
            read_parallel(files)

    def test_pairs_give_both_directions_with_their_own_english(self, tmp_path: Path) -> None:
        files = [put(tmp_path, "de-en.tsv", "a\tb\n"), put(tmp_path, "fr-en.tsv", "c\td\n")]
        parallel = read_parallel(files)
        assert {name: (parallel.texts[x], parallel.texts[y]) for name, x, y in parallel.directions} == {
            "de-en": (["a"], ["b"]),
            "en-de": (["b"], ["a"]),
            "fr-en": (["c"], ["d"]),
            "en-fr": (["d"], ["c"]),
        }


class TestSlots:
    def test_xsid_conll(self, tmp_path: Path) -> None:
        text = (
            "# id = 1\n# text = Wecke mich um sieben Uhr.\n# intent = alarm\n"
            "1\tWecke\talarm\tO\n2\tmich\talarm\tO\n3\tum\talarm\tB-datetime\n4\tsieben\talarm\tI-datetime\n"
            "5\tUhr\talarm\tI-datetime\n6\t.\talarm\tO\n\n# text = Hallo\n1\tHallo\tx\tO\n"
        )
        rows, _ = read_slots([put(tmp_path, "de.valid.conll", text)])
        assert rows[0].text == "Wecke mich um sieben Uhr."
        assert rows[0].slots == (("datetime", "um sieben Uhr"),)
        assert rows[0].tags == ("O", "O", "datetime", "datetime", "datetime", "O")
        assert (rows[1].text, rows[1].slots, rows[1].language) == ("Hallo", (), "de")

    def test_text_with_tags(self, tmp_path: Path) -> None:
        rows, _ = read_slots([put(tmp_path, "en.train.tsv", "play jazz now\tO B-genre B-time\tmusic\n")])
        assert rows[0].slots == (("genre", "jazz"), ("time", "now"))

    def test_massive(self, tmp_path: Path) -> None:
        row = {"locale": "de-DE", "utt": "weck mich um fünf", "annot_utt": "weck mich [time : um fünf]"}
        rows, _ = read_slots([put(tmp_path, "massive.jsonl", json.dumps(row) + "\n")])
        assert rows[0].slots == (("time", "um fünf"),)
        assert rows[0].tokens == ("weck", "mich", "um", "fünf")
        assert rows[0].tags == ("O", "O", "time", "time")
        assert rows[0].language == "de"

    def test_chinese_of_taiwan_is_apart_from_that_of_the_mainland(self, tmp_path: Path) -> None:
        for given in ("", "zh-TW="):
            rows = [{"locale": code, "annot_utt": "[time : 五點]叫我"} for code in ("zh-TW", "zh-CN")]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            found = read_slots([given + put(tmp_path, "massive.jsonl", text)])[0]
            assert [row.language for row in found] == ["zh-Hant", "zh-Hant" if given else "zh"]
            assert all(row.tags == ("time", "time", "O", "O") for row in found)

    def test_massive_counts_japanese_and_chinese_by_character(self, tmp_path: Path) -> None:
        row = {"locale": "ja-JP", "utt": "朝5時に", "annot_utt": "[time : 朝5時]に"}
        rows, _ = read_slots([put(tmp_path, "massive.jsonl", json.dumps(row) + "\n")])
        assert rows[0].tokens == ("朝", "5", "時", "に")
        assert rows[0].tags == ("time", "time", "time", "O")
        assert split_tokens("play ジャズ", "ja") == ("play", "ジ", "ャ", "ズ")

    def test_slots_spelled_out_need_not_occur_in_the_text(self, tmp_path: Path) -> None:
        row = {"text": "morgen", "slots": [{"type": "date", "value": "tomorrow"}], "language": "de"}
        rows, _ = read_slots([put(tmp_path, "x.jsonl", json.dumps(row) + "\n")])
        assert (rows[0].slots, rows[0].tokens) == ((("date", "tomorrow"),), ())

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("de.conll", "# text = a\n1\ta\tO\n", r"slots.columns: de\.conll.*2"),
            ("de.tsv", "a b\tO\n", r"slots.tag-count: de\.tsv.*1.*2.*1"),
            ("data.tsv", "a\tO\n", "data.no-language"),
            ("de.txt", "only text\n", "slots.format"),
            ("de.jsonl", '{"text": "a"}\n', r"slots.json: de\.jsonl.*1"),
            ("de.jsonl", '{"annot_utt": 3}\n', "slots.massive"),
            ("de.jsonl", '{"text": \n', "row.not-json"),
            ("de.txt", "\n\n", "data.empty"),
        ],
    )
    def test_malformed_rows_are_refused(self, tmp_path: Path, name: str, text: str, message: str) -> None:
        with refuses(message) as caught:
            read_slots([put(tmp_path, name, text)])
        assert "\n" not in str(caught.value)

    def test_a_given_language_wins_over_what_the_rows_say(self, tmp_path: Path) -> None:
        row = {"text": "a", "slots": [], "language": "de"}
        path = put(tmp_path, "x.jsonl", json.dumps(row) + "\n")
        assert read_slots([path])[0][0].language == "de"
        assert read_slots([f"gsw={path}"])[0][0].language == "gsw"
