"""Answers to questions, and scores against a plain account of SQuAD's and MLQA's."""

from __future__ import annotations

import string
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import get_task, get_template
from adaptermix.tasks.qa import QaRow, answer_tokens

from ..scoring import count

TASK = get_task("qa")
# from the paper's scorer: what is no content word
ARTICLES = {
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "de": "ein eine einen einem eines einer der die das den dem des",
    "vi": "của là cái chiếc những",
}


def qa(*answers: str, language: str = "en") -> QaRow:
    return QaRow(question="Who?", context="It was she.", answers=answers, language=language)


def plain_tokens(text: str, language: str) -> list[str]:
    """Character by character, without regular expressions."""
    kept = ""
    for character in text.lower():
        if character in string.punctuation or unicodedata.category(character)[0] == "P":
            continue
        wide = "一" <= character <= "龥"
        kana = "ぁ" <= character <= "ん" or "ァ" <= character <= "ー"
        apart = (language in ("zh", "ja") and wide) or (language == "ja" and kana)
        kept += f" {character} " if apart else character
    if language == "ar":
        kept = kept.replace("ال", " ")
    return [word for word in kept.split() if word not in ARTICLES.get(language, "").split()]


def plain_scores(golds: list[str], answer: str, language: str) -> tuple[float, float]:
    """Best F1 and best exact match, the bags compared by crossing out."""
    best_f1, best_exact = 0.0, 0.0
    for gold in golds:
        want, have = plain_tokens(gold, language), plain_tokens(answer, language)
        left, hits = list(want), 0
        for token in have:
            if token in left:
                left.remove(token)
                hits += 1
        if not want or not have:
            f1 = 1.0 if want == have else 0.0
        elif hits == 0:
            f1 = 0.0
        else:
            precision, recall = hits / len(have), hits / len(want)
            f1 = 2 * precision * recall / (precision + recall)
        best_f1, best_exact = max(best_f1, f1), max(best_exact, 1.0 if want == have else 0.0)
    return best_f1, best_exact


pieces = {
    "en": ["the", "a", "an", "cat", "Cat", "then", "U.S.", "—", "x-y", "'s", "2,000"],
    "es": ["el", "La", "unas", "gato", "¿", "años", "las"],
    "de": ["Der", "eine", "einer", "einerlei", "Straße", "„", "des"],
    "vi": ["của", "cái", "nhà", "những", "Là"],
    "ar": ["البيت", "ال", "كتاب", "،", "سؤال"],
    "hi": ["घर", "।", "यह", "the"],
    "tr": ["bir", "İyi", "ev", "the"],
    "zh": ["北京", "。", "the AI", "2008", "年", "、", "我"],
    "ja": ["東京", "タワー", "に", "the", "AI", "。"],
}


@pytest.mark.parametrize("language", pieces)
@given(data=st.data())
def test_scores_are_those_of_a_plain_account(language: str, data: st.DataObject) -> None:
    text = st.lists(st.sampled_from(pieces[language]), max_size=6)
    joined = st.tuples(text, st.sampled_from(["", " "])).map(lambda drawn: drawn[1].join(drawn[0]))
    golds = data.draw(st.lists(joined, min_size=1, max_size=3))
    answer = data.draw(joined | st.sampled_from(golds))
    f1, exact = plain_scores(golds, answer, language)
    found = count(TASK, qa(*golds, language=language), answer)
    assert found["f1"] == (pytest.approx(f1), 1)
    assert found["exact_match"] == (exact, 1)


# other line ends than "\n" are blanks to all
@given(st.lists(st.text(max_size=12), min_size=1, max_size=3), st.text(max_size=12), st.sampled_from([*pieces]))
def test_any_text_scores_within_bounds_and_itself_fully(golds: list[str], answer: str, language: str) -> None:
    row = qa(*golds, language=language)
    f1, exact = (count(TASK, row, answer)[name][0] for name in ("f1", "exact_match"))
    assert 0 <= exact <= f1 <= 1
    own = " ".join(golds[0].split())
    assert count(TASK, qa(own, language=language), own) == {"f1": (1, 1), "exact_match": (1, 1)}


@pytest.mark.parametrize(
    ("text", "language", "tokens"),
    [
        ("The  Old, (old) house!", "en", ["old", "old", "house"]),
        ("the theatre of a", "en", ["theatre", "of"]),
        ("the", "fr", ["the"]),
        ("“Die” Straße des 17. Juni", "de", ["straße", "17", "juni"]),
        ("¿El año?", "es", ["año"]),
        ("البيت الكبير،", "ar", ["بيت", "كبير"]),
        ("यह घर।", "hi", ["यह", "घर"]),
        ("在2008年，Beijing Games", "zh", ["在", "2008", "年", "beijing", "games"]),  # noqa: RUF001
        ("東京タワー (Tower)", "ja", ["東", "京", "タ", "ワ", "ー", "tower"]),
        ("東京タワー", "zh", ["東", "京", "タワー"]),
        ("臺北101", "zh-Hant", ["臺", "北", "101"]),
        ("...", "en", []),
    ],
)
def test_tokens(text: str, language: str, tokens: list[str]) -> None:
    assert answer_tokens(text, language) == tokens


def test_the_best_right_answer_counts() -> None:
    found = count(TASK, qa("Ada Lovelace", "Lovelace", "Countess of Lovelace"), "the Lovelace.")
    assert found == {"f1": (1, 1), "exact_match": (1, 1)}
    assert count(TASK, qa("Ada Lovelace"), "Lady Lovelace")["f1"] == (pytest.approx(0.5), 1)


@pytest.mark.parametrize(
    ("answer", "score"),
    [("", 1), (" ", 1), ("unanswerable", 1), (" Unanswerable.\n", 1), ("Ada", 0), ("it is unanswerable", 0)],
)
def test_what_has_no_answer_is_answered_by_saying_so_or_nothing(answer: str, score: float) -> None:
    assert TASK.answer(qa()) == "unanswerable"
    assert count(TASK, qa(), answer) == {"f1": (score, 1), "exact_match": (score, 1)}


def test_an_answer_that_is_there_is_missed_by_saying_nothing() -> None:
    for answer in ("", "unanswerable"):
        assert count(TASK, qa("Ada"), answer) == {"f1": (0, 1), "exact_match": (0, 1)}


def test_only_the_first_line_of_an_answer_counts() -> None:
    assert count(TASK, qa("Ada"), " Ada\nQuestion: Who else?") == count(TASK, qa("Ada"), "Ada")
    assert TASK.one_line


def test_prompts(causal: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(causal)
    row = QaRow(question="Who {is}?", context="Ada is.", answers=("Ada", "she"), language="en")
    plain = get_template(TASK)
    assert plain.name == "plain"
    assert plain.render(TASK.fields(row), tokenizer) == "Context: Ada is.\nQuestion: Who {is}?\nAnswer:"
    assert plain.lead + TASK.answer(row) == " Ada"
    chat = get_template(TASK, "chat").render(TASK.fields(row), tokenizer)
    assert chat.startswith("<system>Answer the question with")
    assert "'unanswerable'" in chat
    assert chat.endswith("\n<user>Context: Ada is.\nQuestion: Who {is}?\n<a>")


def test_scores_are_means_by_language() -> None:
    rows = [qa("Ada"), qa("Bob"), qa("das Haus", language="de")]
    found = score_answers(TASK, rows, ["Ada", "Ada Bob", "Haus"], {}, seed=0)
    assert found.metric == "f1"
    assert found.scores["en"].value == pytest.approx((1 + 2 / 3) / 2)
    assert found.others["exact_match"]["en"].value == 0.5
    assert found.scores["de"].value == 1
