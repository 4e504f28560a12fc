"""The data of the intents demo: parts that share no sentence pattern, in parallel languages."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from adaptermix.demo.corpus import commands, lexicon_of
from adaptermix.demo.intents import ALIGN_LANGUAGES, INTENTS, LANGUAGES, intent_of, sentences, templates, write_intents

PARTS = ("train", "pairs", "dev", "test")
SLOT = re.compile(r"\{\w+\}")


def pattern(text: str) -> str:
    """The words of a template around its slots, in order, whatever their case and punctuation."""
    return " ".join(re.findall(r"\w+", SLOT.sub(" ", text).casefold()))


def languages_of(part: str) -> list[str]:
    return [language for language in LANGUAGES if templates(part, lexicon_of(language))]


def test_each_part_has_the_languages_that_it_needs() -> None:
    assert {part: languages_of(part) for part in PARTS} == {
        "train": sorted(["en", *ALIGN_LANGUAGES], key=LANGUAGES.index),
        "pairs": sorted(["en", *ALIGN_LANGUAGES], key=LANGUAGES.index),
        "dev": list(LANGUAGES),
        "test": list(LANGUAGES),
    }


@pytest.mark.parametrize("language", ["en", *ALIGN_LANGUAGES])
def test_pairs_have_the_commands_of_training(language: str) -> None:
    lexicon = lexicon_of(language)
    assert set(templates("train", lexicon).values()) < set(templates("pairs", lexicon).values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_parts_share_a_template_or_its_words(language: str) -> None:
    # pairs have the commands of training too
    found = {part: [pattern(t) for t in templates(part, lexicon_of(language)).values()] for part in PARTS[1:]}
    every = [text for texts in found.values() for text in texts]
    assert len(set(every)) == len(every)
    for one, other in permutations(found, 2):  # not even as a part of a longer one
        assert not [(a, b) for a in found[one] for b in found[other] if f" {a} " in f" {b} "]


@pytest.mark.parametrize("language", ["en", *ALIGN_LANGUAGES])
def test_no_sentence_of_pairs_or_training_is_a_command_of_dev_or_test(language: str) -> None:
    held_out = {row.text.casefold() for part in ("dev", "test") for row in sentences(part, language, 800)}
    seen = [part for part in ("train", "pairs") if language in languages_of(part)]
    assert not held_out & {row.text.casefold() for part in seen for row in sentences(part, language, 5000)}


def test_every_intent_is_in_training_dev_and_test() -> None:
    for part in ("train", "dev", "test"):
        counts = Counter(intent_of(row.key.split("/")[0]) for row in sentences(part, "en", 96))
        assert set(counts) == set(INTENTS)
        assert min(counts.values()) >= 6


@pytest.mark.parametrize("part", ["pairs", "dev", "test"])
def test_row_i_means_the_same_in_every_language(part: str) -> None:
    english = sentences(part, "en", 200)
    for language in languages_of(part):
        other = sentences(part, language, 200)
        assert [(row.key, row.slots) for row in other] == [(row.key, row.slots) for row in english]


@pytest.mark.parametrize("language", ["en", *ALIGN_LANGUAGES])
def test_templates_have_the_slots_of_the_english_ones_and_whole_sentences(language: str) -> None:
    for part in ("train", "pairs"):
        english, other = templates(part, lexicon_of("en")), templates(part, lexicon_of(language))
        if language in languages_of(part):
            slots = {name: sorted(SLOT.findall(text)) for name, text in other.items()}
            assert slots == {name: sorted(SLOT.findall(text)) for name, text in english.items()}
            assert all(re.fullmatch(r"[^ ]+( [^ ]+)*[.?]", text) for text in other.values())
            assert len(set(other.values())) == len(other)


def test_no_demo_tests_what_another_trains_or_chooses_on() -> None:
    intents = {part: {row.text for row in sentences(part, "de", 800)} for part in ("dev", "test")}
    slots = {part: {row.text for row in commands(part, "de", 3000)} for part in ("train", "dev", "test")}
    assert not intents["test"] & (slots["train"] | slots["dev"])
    assert not intents["dev"] & slots["test"]


def test_files_have_labels_and_patterns_as_clusters(tmp_path: Path) -> None:
    write_intents(tmp_path, train=5, dev=4, test=6, pairs=3)
    rows = [json.loads(line) for line in (tmp_path / "test.pap.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["cluster"].split("_")[0] for row in rows] == [row["label"] for row in rows]
    assert len({row["cluster"] for row in rows}) == 6
    assert {path.name for path in tmp_path.iterdir()} == {
        "train.en.jsonl",
        *(f"pairs.{language}-en.tsv" for language in ALIGN_LANGUAGES),
        *(f"{part}.{language}.jsonl" for part in ("dev", "test") for language in LANGUAGES),
    }
    english = [row.text for row in sentences("pairs", "en", 3)]
    lines = (tmp_path / "pairs.lb-en.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[1] for line in lines] == english


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no sentences in 'fr'"):
        sentences("pairs", "fr", 1)
    with pytest.raises(ValueError, match=r"has \d+ sentences, but 100000 were requested"):
        sentences("test", "de", 100_000)
    with pytest.raises(ValueError, match="no lexicon of 'xx'"):
        sentences("test", "xx", 1)
    with pytest.raises(ValueError, match="no part 'valid'"):
        sentences("valid", "de", 1)  # type: ignore[arg-type]
