"""Language tags of tokenizers: each text gets the tag of its language, wherever texts are encoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import M2M100Tokenizer

from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head
from adaptermix.models.languages import Tagged, language_tags
from adaptermix.progress import SILENT
from adaptermix.tasks import get_task
from adaptermix.tasks.classify import ClassifyRow
from adaptermix.tasks.data import Pair
from adaptermix.tasks.heads import HEADS
from adaptermix.tasks.qa import QaRow
from adaptermix.tasks.slots import SlotRow
from adaptermix.training.pairs import encode_side

from .halves import tiny_encoder_decoder, tokenizer_of
from .refusals import refuses


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tiny_encoder_decoder(tmp_path_factory.mktemp("tags") / "nllb", "nllb")
    return load_base(str(folder), device="cpu", dtype="float32")


def first_tokens(base: BaseModel, rows: list[list[int]]) -> list[str]:
    return [base.tokenizer.convert_ids_to_tokens(row[0]) for row in rows]


def test_tags_are_found_by_language_in_their_usual_script(nllb: BaseModel) -> None:
    expected = {
        "jv": "jav_Latn",
        "en": "eng_Latn",
        "de": "deu_Latn",
        "ace": "ace_Latn",
        "zh": "zho_Hans",
        "zh-Hant": "zho_Hant",
    }
    assert nllb.tags == expected
    assert language_tags(tokenizer_of("mbart"))["zh"] == "zh_CN"
    assert language_tags(tokenizer_of("t5")) == {}


def test_tags_of_m2m100_are_spelled_as_it_reads_them() -> None:
    class Spelled(M2M100Tokenizer):
        src_lang = "en"
        all_special_tokens = ("<s>", "__en__", "__zh__", "__ilo__")

        def __init__(self) -> None:
            """Without the files of its vocabulary."""

    assert language_tags(Spelled()) == {"en": "en", "zh": "zh", "ilo": "ilo"}


def test_each_text_gets_the_tag_of_its_language(nllb: BaseModel) -> None:
    languages = ["de", "en", "ace", "de", "zh-TW", "deu"]
    tags = ["deu_Latn", "eng_Latn", "ace_Latn", "deu_Latn", "zho_Hant", "deu_Latn"]
    texts = [f"text {number}" for number in range(len(languages))]
    rows = nllb.encode(texts, languages)
    assert first_tokens(nllb, [row["input_ids"] for row in rows]) == tags
    assert [nllb.tokenizer.decode(row["input_ids"], skip_special_tokens=True).strip() for row in rows] == texts
    pairs = nllb.encode([(text, "b") for text in texts], languages)
    assert first_tokens(nllb, [row["input_ids"] for row in pairs]) == tags
    words = nllb.encode([["two", "words"]] * 2, ["de", "en"], is_split_into_words=True)
    assert first_tokens(nllb, [row["input_ids"] for row in words]) == ["deu_Latn", "eng_Latn"]
    assert words[0].word_ids() == [None, *[0] * 4, *[1] * 6, None]
    assert nllb.tokenizer.src_lang == "eng_Latn"  # as before


def test_a_language_without_a_tag_is_refused_by_name(nllb: BaseModel) -> None:
    with refuses("model.language: 'fr'"):
        nllb.encode(["a", "b", "c"], ["de", "fr", "en"])
    one = Tagged(tokenizer=nllb.tokenizer, tags={"": "deu_Latn"})
    assert one.without_tag(["fr"]) is None
    assert first_tokens(nllb, [one.encode(["a"], ["fr"])[0]["input_ids"]]) == ["deu_Latn"]


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_plain_bases_ignore_languages(kind: str, request: pytest.FixtureRequest) -> None:
    base = load_base(str(request.getfixturevalue(kind)), device="cpu")
    texts = ["a long text", "b"]
    options = {"truncation": True, "max_length": 6}
    together = base.encode(texts, ["xx", ""], **options)
    assert [dict(row) for row in together] == [dict(base.tokenizer(text, **options)) for text in texts]
    pairs = base.encode([("a", "b")], ["xx"])
    assert dict(pairs[0]) == dict(base.tokenizer("a", "b"))
    assert base.encode([], []) == []


def test_heads_and_pairs_read_tagged_texts(nllb: BaseModel) -> None:
    languages = ["de", "ace"]
    tags = ["deu_Latn", "ace_Latn"]
    rows = {
        "classes": ("classify", [ClassifyRow(text="ab", label="x", language=language) for language in languages]),
        "tokens": (
            "slots",
            [SlotRow(text="go a", tokens=("go", "a"), tags=("O", "B-c"), language=each) for each in languages],
        ),
        "span": (
            "qa",
            [QaRow(question="who", context="ada " * 40, answers=("ada",), language=each) for each in languages],
        ),
    }
    for name, (task, of_task) in rows.items():
        base = replace(nllb, head=Head(form=HEAD_FORMS[name], labels=("x", "O", "B-c", "I-c")))
        encoded = HEADS[name].encode(base, get_task(task), of_task, max_length=32)
        for texts, tag in zip(encoded.texts, tags, strict=True):
            assert {*first_tokens(nllb, [text["input_ids"] for text in texts])} == {tag}
    pairs = [
        Pair(source="a", target="b", languages=("de", "en")),
        Pair(source="a", target="b", languages=("ace", "de")),
    ]
    source, target = (encode_side(nllb, pairs, side, 16, SILENT) for side in ("source", "target"))
    assert first_tokens(nllb, source) == tags
    assert first_tokens(nllb, target) == ["eng_Latn", "deu_Latn"]


def test_the_tokenizer_is_left_as_it_was_when_a_text_fails(nllb: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        nllb.encode(["a"], ["de"], max_length="long", truncation=True)
    assert nllb.tokenizer.src_lang == "eng_Latn"
