"""Prompts and answers in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adaptermix.tasks import get_task, get_template
from tests.tiny import CHAT, tiny_causal

from ..refusals import refuses

SLOTS = get_task("slots")


@pytest.fixture(scope="module")
def tokenizer(causal: Path) -> Any:
    return AutoTokenizer.from_pretrained(causal)


def test_plain_prompt_and_answer_join_to_one_text(tokenizer: Any) -> None:
    template = get_template(SLOTS, "plain")
    ids = template.encode({"text": "wake me"}, tokenizer) + template.encode_answer("time: five", tokenizer)
    assert tokenizer.decode(ids) == "Command: wake me\nSlots: time: five</s>"


def test_the_chat_template_is_used_without_a_second_start_token(tokenizer: Any) -> None:
    ids = get_template(SLOTS, "mid-align").encode({"text": "wake me"}, tokenizer)
    text = tokenizer.decode(ids)
    assert text.startswith("<system>Given a command")
    assert text.endswith("<user>wake me\n<a>")


def test_a_chat_template_without_system_turn_gets_it_before_the_command(tokenizer: Any) -> None:
    strict = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['content'] }}]{% endfor %}"
    )
    text = get_template(SLOTS, "mid-align").render({"text": "wake me"}, strict)
    assert text.startswith("[Given a command")
    assert text.endswith("wake me]")


def test_a_missing_chat_template_is_refused(tokenizer: Any) -> None:
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    with refuses("template.no-chat"):
        get_template(SLOTS, "mid-align").render({"text": "x"}, bare)


def test_unknown_names_are_refused() -> None:
    with refuses("task.template: plain, mid-align"):
        get_template(SLOTS, "fancy")
    with refuses("task.unknown"):
        get_task("slot")


def test_the_system_turn_is_the_published_one() -> None:
    system = get_template(SLOTS, "mid-align").system
    assert system is not None
    assert (
        "extract the entities as words from the command if they fall under a predefined list of entity types" in system
    )


@pytest.mark.parametrize("task", ["slots", "translate"])
def test_the_released_adapters_have_a_line_break_after_each_turn(tokenizer: Any, task: str) -> None:
    """Llama 3's layout; the start token comes once, from the chat template or else from the tokenizer."""
    llama = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    llama.chat_template = (
        "<s>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    fields = {"text": "wake me", "source": "German", "target": "English"}
    plain, broken = (get_template(get_task(task), name) for name in ("mid-align", "mid-align-eot"))
    assert plain.system == broken.system
    text = broken.render(fields, llama)
    assert text.replace("<|eot_id|>\n", "<|eot_id|>") == plain.render(fields, llama)
    assert text.count("<|eot_id|>\n<|start_header_id|>") == 2
    assert text.endswith("wake me<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert broken.encode(fields, llama).count(llama.bos_token_id) == 1
    with refuses(r"template.writes: mid-align-eot.*<\|eot_id\|>"):
        broken.render(fields, tokenizer)


@pytest.mark.parametrize("text", ["wake me", "{braces} {0} {text}", "  blanks  ", "Grüße 日本\nzwei", ""])
@pytest.mark.parametrize("name", ["plain", "mid-align"])
def test_prompt_and_answer_join_to_the_tokens_of_the_whole(tokenizer: Any, name: str, text: str) -> None:
    template = get_template(SLOTS, name)
    joined = template.encode({"text": text}, tokenizer) + template.encode_answer("time: five", tokenizer)
    whole = template.render({"text": text}, tokenizer) + template.lead + "time: five" + tokenizer.eos_token
    assert joined == tokenizer(whole)["input_ids"]


@pytest.mark.parametrize(
    ("single", "chat", "starts"),
    [
        ("<s> $A", None, 1),
        ("<s> $A </s>", None, 1),
        (None, None, 0),
        ("<s> $A", "<s>", 1),
        ("<s> $A </s>", "<s>", 1),
        ("<s> $A", "", 1),
        ("<s> $A </s>", "", 1),
        ("$A </s>", "", 0),
        (None, "<s>", 1),
        (None, "", 0),
    ],
)
def test_there_is_at_most_one_start_token_and_no_end_before_the_answer(
    single: str | None, chat: str | None, starts: int, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal(tmp_path / "model", single=single))
    if chat is not None:
        tokenizer.chat_template = chat + CHAT
    template = get_template(SLOTS, "plain" if chat is None else "mid-align")
    prompt, answer = template.encode({"text": "wake me"}, tokenizer), template.encode_answer("None", tokenizer)
    assert prompt.count(tokenizer.bos_token_id) == starts
    assert prompt[:1] == [tokenizer.bos_token_id] or not starts
    assert tokenizer.eos_token_id not in prompt
    assert answer.count(tokenizer.bos_token_id) == 0
    assert [i for i, token in enumerate(answer) if token == tokenizer.eos_token_id] == [len(answer) - 1]


@pytest.mark.parametrize(
    "chat", ["{{ raise_exception('never') }}", "{% for %}", "{{ 1 + messages[0].content }}", "{{ 1 // 0 }}"]
)
def test_a_chat_template_that_always_fails_is_refused(tokenizer: Any, chat: str) -> None:
    broken = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    broken.chat_template = chat
    with refuses("template.roles: mid-align"):
        get_template(SLOTS, "mid-align").encode({"text": "x"}, broken)


def with_turns(tokenizer: Any, folder: Path, ends: str, chat: str, **special: str) -> Any:
    """A tokenizer with two more tokens and a chat template, saved and loaded again."""
    made = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", ends], **special})
    made.chat_template = chat
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("ends", "chat"),
    [
        ("<|im_end|>", TURNS.replace("END", "<|im_end|>")),
        ("<end_of_turn>", TURNS.replace("END", " <end_of_turn>")),
        # templates that put nothing but the end behind the last answer, and then the end of the text
        ("<|eot|>", TURNS.replace("END\n", "<|eot|>") + "</s>"),
    ],
)
def test_an_answer_ends_as_the_chat_template_ends_a_turn(tokenizer: Any, ends: str, chat: str, tmp_path: Path) -> None:
    turned = with_turns(tokenizer, tmp_path / "turned", ends, chat)
    assert turned.eos_token_id == turned.convert_tokens_to_ids("</s>")
    template = get_template(SLOTS, "mid-align")
    assert turned.decode(template.encode_answer("time: five", turned)) == f"time: five{ends}"
    # without a chat a text ends
    assert turned.decode(get_template(SLOTS, "plain").encode_answer("x", turned)) == " x</s>"


@pytest.mark.parametrize(
    "chat", [CHAT, "{{ raise_exception('no') }}", "{% for m in messages %}{{ m['content'] }} done.{% endfor %}"]
)
def test_a_turn_that_no_special_token_ends_is_ended_as_a_text(tokenizer: Any, chat: str) -> None:
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = chat
    assert get_template(SLOTS, "mid-align").end(plain) == plain.eos_token_id


@pytest.mark.parametrize(
    "opening",
    [
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
        "{% if thinking is defined and not thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}",
        "<think>\n",
        "<think>",
    ],
)
def test_models_that_think_aloud_are_told_not_to(tokenizer: Any, opening: str) -> None:
    thinking = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    thinking.chat_template = CHAT.replace("<a>", f"<a>{opening}")
    text = get_template(SLOTS, "mid-align").render({"text": "wake me"}, thinking)
    assert text.endswith("<user>wake me\n<a><think>\n\n</think>\n\n")
