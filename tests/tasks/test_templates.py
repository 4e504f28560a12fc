"""Prompts and answers in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adaptermix.errors import ModelError, PlanError
from adaptermix.tasks import get_task, get_template


@pytest.fixture(scope="module")
def tokenizer(causal: Path) -> Any:
    return AutoTokenizer.from_pretrained(causal)


def test_plain_prompt_and_answer_join_to_one_text(tokenizer: Any) -> None:
    template = get_template("plain")
    ids = template.encode("wake me", tokenizer) + template.encode_answer("time: five", tokenizer)
    assert tokenizer.decode(ids) == "Command: wake me\nSlots: time: five</s>"


def test_the_chat_template_is_used_without_a_second_start_token(tokenizer: Any) -> None:
    ids = get_template("mid-align").encode("wake me", tokenizer)
    text = tokenizer.decode(ids)
    assert text.startswith("<system>Given a command")
    assert text.endswith("<user>wake me\n<a>")


def test_a_chat_template_without_system_turn_gets_it_before_the_command(tokenizer: Any) -> None:
    strict = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['content'] }}]{% endfor %}"
    )
    text = get_template("mid-align").render("wake me", strict)
    assert text.startswith("[Given a command")
    assert text.endswith("wake me]")


def test_a_missing_chat_template_is_refused(tokenizer: Any) -> None:
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    with pytest.raises(ModelError, match="--template plain"):
        get_template("mid-align").render("x", bare)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(PlanError, match="plain, mid-align"):
        get_template("fancy")
    with pytest.raises(PlanError, match="must be one of slots"):
        get_task("slot")
