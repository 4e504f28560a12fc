"""Translation: what is asked, what is taught, and how it is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoTokenizer

from adaptermix.evaluation.run import score_answers
from adaptermix.models.languages import canonical_language
from adaptermix.tasks import get_task, get_template, overlap
from adaptermix.tasks.base import remarks
from adaptermix.tasks.data.language_names import _NAMES, english_name
from adaptermix.tasks.translate import TranslateRow

from ..refusals import refuses
from ..scoring import count

TASK = get_task("translate")


def row(source: str, target: str, pair: str = "de-en") -> TranslateRow:
    one, two = pair.split("-")
    return TranslateRow(source=source, target=target, source_language=one, target_language=two)


@pytest.fixture(scope="module")
def tokenizer(causal: Path) -> Any:
    return AutoTokenizer.from_pretrained(causal)


def test_the_plain_prompt_names_both_languages(tokenizer: Any) -> None:
    template = get_template(TASK)
    assert template.name == "plain"
    given = row("Guten Tag {x}", "Good day")
    assert template.render(TASK.fields(given), tokenizer) == (
        "Translate from German to English.\nGerman: Guten Tag {x}\nEnglish:"
    )
    assert template.lead + TASK.answer(given) == " Good day"


def test_the_chat_prompt_is_the_published_one(tokenizer: Any) -> None:
    text = get_template(TASK, "mid-align").render(TASK.fields(row("Dobrý den", "Good day", "cs-en")), tokenizer)
    assert text == "<system>Translate the following sentences from Czech to English.\n<user>Dobrý den\n<a>"


def test_a_language_without_a_name_is_called_by_its_code() -> None:
    assert TASK.fields(row("a", "b", "bar-de")) == {"text": "a", "source": "bar", "target": "German"}


def test_the_prompt_tells_traditional_chinese_from_chinese(tmp_path: Path) -> None:
    for name in ("zh-TW-en.tsv", "zh-CN-en.tsv"):
        (tmp_path / name).write_text("a\tb\n")
    rows, _ = TASK.read([str(tmp_path / "*.tsv")], rows=None)
    assert [TASK.fields(row)["source"] for row in rows] == ["Chinese", "Traditional Chinese"]
    assert [TASK.language(row) for row in rows] == ["zh-en", "zh-Hant-en"]


def test_codes_with_names_are_those_that_readers_give() -> None:
    assert {code: canonical_language(code) for code in _NAMES if code not in ("no", "tl")} == {
        code: code for code in _NAMES if code not in ("no", "tl")
    }
    assert len(set(_NAMES.values())) == len(_NAMES)
    assert all(name == english_name(code) and name[0].isupper() for code, name in _NAMES.items())


def test_the_language_of_a_row_is_its_pair() -> None:
    assert TASK.language(row("a", "b", "en-zh")) == "en-zh"
    assert TASK.one_line


def test_scores_are_those_of_sacrebleu_for_each_pair_with_its_tokenizer() -> None:
    triples = {
        "de-en": [
            ("a", "The cat sat on the mat.", "The cat sat on a mat."),
            ("b", "It is 3.5 here, now.", "It is 3.5"),
        ],
        "en-zh": [("a", "我们今天去了北京。", "我们今天去北京。"), ("b", "AI很好", "")],
        "en-ja": [("a", "東京に行きました。", "東京に行きます。"), ("b", "カメラを買った。", "カメラを買った。")],
        "en-ko": [("a", "나는 학교에 간다.", "나는 학교에 갔다."), ("b", "집에 있다.", "집에 있다.")],
    }
    rows = [row(source, target, pair) for pair, rows in triples.items() for source, target, _ in rows]
    answers = [answer for rows in triples.values() for _, _, answer in rows]
    found = score_answers(TASK, rows, answers, {}, seed=0)
    assert (found.metric, list(found.scores)) == ("bleu", list(triples))
    for pair, tokenizer in zip(triples, ["13a", "zh", "ja-mecab", "ko-mecab"], strict=True):
        references, given = [[t[1] for t in triples[pair]]], [t[2] for t in triples[pair]]
        expected = BLEU(tokenize=tokenizer).corpus_score(given, references).score
        assert found.scores[pair].value == pytest.approx(expected)
        assert found.others["chrf"][pair].value == pytest.approx(CHRF().corpus_score(given, references).score)
        plain = BLEU(tokenize="13a").corpus_score(given, references).score
        assert found.others["bleu-13a"][pair].value == pytest.approx(plain)
    assert found.overall.value == pytest.approx(sum(score.value for score in found.scores.values()) / 4)
    assert "bleu-13a" not in score_answers(TASK, rows[:2], answers[:2], {}, seed=0).others


def test_only_the_first_line_of_an_answer_counts() -> None:
    given = row("a", "one two three four")
    assert count(TASK, given, " one two three four\nGerman: b") == count(TASK, given, "one two three four")
    assert count(TASK, given, "\n")["bleu"][0] == 0


def test_a_missing_tokenizer_is_refused_before_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    overlap._bleu.cache_clear()
    with refuses("task.bleu-tokenizer"):
        TASK.metrics([row("a", "b", "en-ja")])
    TASK.metrics([row("a", "b", "ja-en")])


def test_scores_say_by_which_tokenizer_words_are_counted() -> None:
    rows = [
        TranslateRow(source="a", target="b c", source_language="en", target_language=language)
        for language in ("th", "de", "zh", "th")
    ]
    assert remarks(TASK, rows)[0] == "BLEU counts words by sacrebleu's tokenizer char for th, zh for zh (others: 13a)."
    assert not any("BLEU" in note for note in remarks(TASK, rows[1:2]))


@pytest.mark.parametrize(
    ("task", "row", "nothing", "some"),
    [
        ("slots", {"text": "go"}, {"slots": []}, {"slots": [{"type": "a", "value": "go"}]}),
        ("ner-json", {"text": "go"}, {"entities": []}, {"entities": [{"type": "LOC", "text": "go"}]}),
        ("qa", {"question": "?", "context": "go"}, {"answers": []}, {"answers": ["go"]}),
        ("classify", {"text": "go"}, {"label": "a"}, {"label": "b"}),
    ],
)
def test_rows_with_nothing_to_find_are_warned_of(
    task: str, row: dict[str, Any], nothing: dict[str, Any], some: dict[str, Any], tmp_path: Path
) -> None:
    kind = get_task(task)

    def read(*rows: dict[str, Any]) -> list[str]:
        (tmp_path / "en.jsonl").write_text("".join(json.dumps(row | more) + "\n" for more in rows))
        return remarks(kind, kind.read([str(tmp_path / "en.jsonl")], rows=None)[0])

    assert "all 2 rows of 'en' have the answer" in read(nothing, nothing)[0]
    assert read(nothing, some) == []
    assert len(read(nothing)) == (task != "classify")
