import json
import re
from collections.abc import Iterator
from importlib.resources import files

import pytest

from adaptermix.demo.corpus import LANGUAGES, Command, commands, pairs, write

SPLITS = ("train", "dev", "test")
SIZES = {"train": 15_000, "dev": 3_000, "test": 3_000}


def lexicon(language: str) -> dict:
    source = files("adaptermix.demo").joinpath("languages", f"{language}.json")
    return json.loads(source.read_text(encoding="utf-8"))


def placeholders(template: str) -> list[str]:
    return sorted(re.findall(r"\{(\w+)\}", template))


def everything(split: str, language: str) -> list[Command]:
    with pytest.raises(ValueError, match="has") as error:
        commands(split, language, 10**9)
    available = int(re.search(r"has (\d+) commands", str(error.value))[1])
    return commands(split, language, available)


@pytest.fixture(scope="module")
def corpus() -> dict[str, dict[str, list[Command]]]:
    return {language: {split: everything(split, language) for split in SPLITS} for language in LANGUAGES}


def rows(corpus: dict[str, dict[str, list[Command]]], language: str) -> Iterator[Command]:
    for split in SPLITS:
        yield from corpus[language][split]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_the_same_templates_and_placeholders_as_english(language):
    english, other = lexicon("en")["templates"], lexicon(language)["templates"]
    assert list(other) == list(english)
    assert {key: placeholders(text) for key, text in other.items()} == {
        key: placeholders(text) for key, text in english.items()
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_template_uses_a_slot_type_twice(language):
    for template in lexicon(language)["templates"].values():
        assert len(set(placeholders(template))) == len(placeholders(template))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_translates_the_same_values(language):
    english, other = lexicon("en")["values"], lexicon(language)["values"]
    assert {kind: list(values) for kind, values in other.items()} == {
        kind: list(values) for kind, values in english.items()
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_values_are_distinct_within_a_type_and_never_empty(language):
    for values in lexicon(language)["values"].values():
        assert all(text == text.strip() != "" for text in values.values())
        assert len(set(values.values())) == len(values)
        assert len(values) >= 12


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_most_values_cannot_be_copied_from_the_sentence(language):
    values = lexicon(language)["values"]
    flat = [(key, text) for kind in values if kind != "person" for key, text in values[kind].items()]
    assert sum(key.lower() in text.lower() for key, text in flat) < 0.15 * len(flat)


def test_there_are_enough_templates_with_zero_to_three_slots():
    templates = lexicon("en")["templates"]
    assert len(templates) >= 28
    assert len({key.rsplit("_", 1)[0] for key in templates}) >= 7
    assert {len(placeholders(text)) for text in templates.values()} == {0, 1, 2, 3}


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_have_no_leftover_braces_or_double_spaces(corpus, language):
    for row in rows(corpus, language):
        assert not set(row.text) & set("{}\t\n")
        assert "  " not in row.text
        assert row.text == row.text.strip()
        assert row.text[0].isupper() or row.text[0] == "¿"
        assert row.text[-1] in ".?"


@pytest.mark.parametrize("language", LANGUAGES)
def test_two_different_keys_never_have_the_same_text(corpus, language):
    texts = [row.text.casefold() for row in rows(corpus, language)]
    assert len(set(texts)) == len(texts)
    assert len({row.key for row in rows(corpus, language)}) == len(texts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_splits_share_no_key_and_no_text(corpus, language):
    for field in ("key", "text"):
        parts = [{getattr(row, field) for row in corpus[language][split]} for split in SPLITS]
        assert len(set.union(*parts)) == sum(len(part) for part in parts)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", SPLITS)
def test_row_i_has_the_same_key_and_slots_in_every_language(corpus, language, split):
    english, other = corpus["en"][split], corpus[language][split]
    assert [(row.key, row.slots) for row in other] == [(row.key, row.slots) for row in english]
    assert {row.language for row in other} == {language}


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_has_thousands_of_rows(corpus, split):
    assert len(corpus["en"][split]) >= SIZES[split]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_dev_and_test_hold_combinations_that_train_never_shows(corpus, split):
    seen = {row.slots for row in corpus["en"]["train"]}
    assert sum(row.slots not in seen for row in corpus["en"][split]) > 100


@pytest.mark.parametrize("split", SPLITS)
def test_every_value_occurs_in_every_split(corpus, split):
    values = lexicon("en")["values"]
    used = {slot for row in corpus["en"][split] for slot in row.slots}
    assert used == {(kind, value) for kind in values for value in values[kind]}


def test_commands_without_slots_are_only_in_train(corpus):
    assert any(not row.slots for row in corpus["en"]["train"])
    assert all(row.slots for split in ("dev", "test") for row in corpus["en"][split])


def test_slots_follow_the_order_of_the_english_sentence():
    english = lexicon("en")
    for row in commands("train", "de", 400):
        template = english["templates"][row.key.split("/")[0]]
        assert [kind for kind, _ in row.slots] == re.findall(r"\{(\w+)\}", template)


def test_the_templates_take_turns():
    drawn = [row.key.split("/")[0] for row in commands("train", "en", 400)]
    assert set(drawn) == set(lexicon("en")["templates"])
    assert max(map(drawn.count, drawn)) <= 20


def test_drawing_twice_gives_the_same_rows():
    assert commands("dev", "sv", 100, seed=3) == commands("dev", "sv", 100, seed=3)
    assert pairs("sv", 100, seed=3) == pairs("sv", 100, seed=3)


def test_another_seed_gives_another_order_of_the_same_split(corpus):
    other = [row.key for row in commands("dev", "en", len(corpus["en"]["dev"]), seed=1)]
    default = [row.key for row in corpus["en"]["dev"]]
    assert other != default
    assert sorted(other) == sorted(default)


def test_a_smaller_count_gives_a_prefix():
    assert commands("test", "da", 200)[:30] == commands("test", "da", 30)


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_pairs_are_train_translations_and_never_dev_or_test_sentences(corpus, language):
    train = {row.text: row.key for row in corpus[language]["train"]}
    english = {row.text: row.key for row in corpus["en"]["train"]}
    drawn = pairs(language, 2_000)
    assert all(train[text] == english[translation] for text, translation in drawn)
    held_out = {row.text for name in LANGUAGES for split in ("dev", "test") for row in corpus[name][split]}
    assert not held_out & {text for pair in drawn for text in pair}


def test_english_has_no_pairs():
    with pytest.raises(ValueError, match="English cannot be paired with itself"):
        pairs("en", 1)


@pytest.mark.parametrize("count", [-1, 10**9])
def test_asking_for_an_impossible_count_is_an_error(count):
    with pytest.raises(ValueError, match=rf"^The dev split has \d+ commands, but {count} were requested\.$"):
        commands("dev", "en", count)


def test_unknown_languages_and_splits_are_errors():
    for language in ("xx", "ht"):  # ht has a lexicon, for the demo of intents
        with pytest.raises(ValueError, match=f"no language '{language}'"):
            commands("train", language, 0)
        with pytest.raises(ValueError, match=f"no language '{language}'"):
            pairs(language, 0)
    with pytest.raises(ValueError, match="no 'validation' split"):
        commands("validation", "en", 0)


def test_the_second_train_row_reads_as_written_down_here():
    key = "music_3/children's songs/Friday/six o'clock"
    slots = (("genre", "children's songs"), ("date", "Friday"), ("time", "six o'clock"))
    english = Command(key=key, language="en", text="Play children's songs on Friday at six o'clock.", slots=slots)
    german = Command(key=key, language="de", text="Spiel am Freitag um sechs Uhr Kinderlieder.", slots=slots)
    assert commands("train", "en", 2)[1] == english
    assert commands("train", "de", 2)[1] == german


def test_write_makes_the_files_that_training_reads(tmp_path):
    folder = tmp_path / "new" / "corpus"
    write(folder, train=7, dev=3, test=4, pairs=5, task_languages=["en"], align_languages=["de", "sv"])
    evaluation = {f"{split}.{language}.jsonl" for split in ("dev", "test") for language in LANGUAGES}
    expected = evaluation | {"train.en.jsonl", "pairs.de-en.tsv", "pairs.sv-en.tsv"}
    assert {path.name for path in folder.iterdir()} == expected
    lines = (folder / "test.de.jsonl").read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [
        {
            "id": row.key,
            "text": row.text,
            "slots": [{"type": kind, "value": value} for kind, value in row.slots],
            "language": "de",
        }
        for row in commands("test", "de", 4)
    ]
    table = (folder / "pairs.sv-en.tsv").read_bytes().decode("utf-8")
    assert table == "".join(f"{text}\t{english}\n" for text, english in pairs("sv", 5))


def test_written_text_is_not_escaped(tmp_path):
    write(tmp_path, train=60, dev=0, test=0, pairs=0, task_languages=["da"], align_languages=[])
    content = (tmp_path / "train.da.jsonl").read_bytes()
    assert "ø".encode() in content
    assert b"\\u" not in content
    assert b"\r" not in content
