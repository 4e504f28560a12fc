"""Answers to prompts and conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import CHRF
from transformers import AutoTokenizer

from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import LabelTask, get_task, get_template
from adaptermix.tasks.sft import SftRow
from tests.tiny import CHAT

from ..refusals import refuses
from ..scoring import count

TASK = get_task("sft")
ASKED = SftRow(turns=(("user", "What is {1}+1?"),), answer="Two.\nThat is 2.", language="en")
LONG = SftRow(
    turns=(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")),
    answer="Bye",
    language="en",
)
# a chat template that knows no system turn, and one for which turns must take turns
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m['role'] }}: {{ m['content'] }}]{% endfor %}"
)


@pytest.fixture
def tokenizer(causal: Path) -> Any:
    found = AutoTokenizer.from_pretrained(causal)
    found.chat_template = CHAT
    return found


def render(name: str, row: SftRow, tokenizer: Any) -> str:
    return get_template(TASK, name).render(TASK.fields(row), tokenizer)


def test_a_plain_prompt_is_its_own_text(tokenizer: Any) -> None:
    assert get_template(TASK).name == "plain"
    assert render("plain", ASKED, tokenizer) == "What is {1}+1?\n"
    template = get_template(TASK)
    ids = template.encode(TASK.fields(ASKED), tokenizer) + template.encode_answer(TASK.answer(ASKED), tokenizer)
    assert tokenizer.decode(ids) == "What is {1}+1?\nTwo.\nThat is 2.</s>"


def test_plain_conversations_name_the_speakers(tokenizer: Any) -> None:
    assert render("plain", LONG, tokenizer) == (
        "Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:\n"
    )


def test_chat_turns_pass_as_they_are(tokenizer: Any) -> None:
    assert render("chat", LONG, tokenizer) == "<system>Be brief.\n<user>Hi\n<assistant>Hello\n<user>Bye\n<a>"
    assert render("chat", ASKED, tokenizer) == "<user>What is {1}+1?\n<a>"


def test_a_chat_template_without_system_turn_gets_it_before_the_first_user_turn(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    assert render("chat", LONG, tokenizer) == "[user: Be brief.\n\nHi][assistant: Hello][user: Bye]"


def test_turns_that_a_chat_template_does_not_take_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    twice = SftRow(turns=(("user", "a"), ("user", "b")), answer="c", language="en")
    with refuses("template.roles: chat.*the turns user, user.*roles must alternate"):
        render("chat", twice, tokenizer)
    tokenizer.chat_template = None
    with refuses("template.no-chat"):
        render("chat", ASKED, tokenizer)


def test_answers_may_have_lines_and_are_no_labels() -> None:
    assert not TASK.one_line
    assert TASK.answer(ASKED) == "Two.\nThat is 2."
    assert not isinstance(TASK, LabelTask)


def test_exact_match_does_not_regard_blanks_at_the_ends_but_all_else() -> None:
    assert count(TASK, ASKED, "\n Two.\nThat is 2. ")["exact_match"] == (True, 1)
    for other in ("two.\nThat is 2.", "Two. That is 2.", "Two.", ""):
        assert count(TASK, ASKED, other)["exact_match"] == (False, 1)


def test_scores_by_language_with_chrf_of_the_whole_set() -> None:
    golds = ["ja", "nein, danke", "yes", "no thanks"]
    answers = ["ja", "nein danke", "", "no thanks\nat all"]
    rows = [
        SftRow(turns=(("user", "?"),), answer=gold, language=language)
        for gold, language in zip(golds, ["de", "de", "und", "und"], strict=True)
    ]
    found = score_answers(TASK, rows, answers, {}, seed=0)
    assert found.metric == "exact_match"
    assert {name: score.value for name, score in found.scores.items()} == {"de": 0.5, "und": 0.0}
    for language, part in (("de", slice(2)), ("und", slice(2, None))):
        expected = CHRF().corpus_score(answers[part], [golds[part]]).score
        assert found.others["chrf"][language].value == pytest.approx(expected)
