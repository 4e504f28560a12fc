"""Prompt templates: the name goes into the manifest, and evaluation uses the one that training used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How a row becomes a prompt.

    Args:
        name: Name in the task's table.
        prompt: Text with the task's placeholders, such as `{text}`; the answer follows it directly.
        lead: What stands between prompt and answer, a blank for plain text.
        chat: Use the tokenizer's chat template.
        system: System turn of the chat, with placeholders too.
    """

    name: str
    prompt: str
    lead: str = ""
    chat: bool = False
    system: str | None = None

    def render(self, fields: Mapping[str, str], tokenizer: Any) -> str:
        """Return the whole prompt as text.

        Raises:
            ModelError: a chat template is needed, and the tokenizer has none or one that fails.
        """
        from jinja2.exceptions import TemplateError

        asked = self.prompt.format_map(fields)
        if not self.chat:
            return asked
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"template '{self.name}' needs a tokenizer with a chat template. Use --template plain.")
        try:
            return _chat(tokenizer, None if self.system is None else self.system.format_map(fields), asked)
        except TemplateError as error:
            raise ModelError(
                f"template '{self.name}' needs a chat template that takes a user turn, and the tokenizer's says: "
                f"{error}. Use --template plain."
            ) from error

    def encode(self, fields: Mapping[str, str], tokenizer: Any) -> list[int]:
        """Return the prompt's token ids, with the tokenizer's special tokens unless the chat template brings them."""
        rendered = self.render(fields, tokenizer)
        ids: list[int] = tokenizer(rendered, add_special_tokens=not self.chat)["input_ids"]
        if not self.chat and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # tokenizers that close every text would end the answer before it began
        return ids

    def encode_answer(self, answer: str, tokenizer: Any) -> list[int]:
        """Return the answer's token ids, closed by the end-of-sequence token."""
        ids: list[int] = tokenizer(self.lead + answer, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]


def _chat(tokenizer: Any, system: str | None, user: str) -> str:
    from jinja2.exceptions import TemplateError

    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": user})
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError:
        if system is None:
            raise
        # some chat templates know no system turn
        joined = [{"role": "user", "content": f"{system}\n\n{user}"}]
        text = tokenizer.apply_chat_template(joined, add_generation_prompt=True, tokenize=False)
    return str(text)


def table(*templates: Template) -> Mapping[str, Template]:
    """Return templates by name, the default first."""
    return {template.name: template for template in templates}
