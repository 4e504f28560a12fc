"""Prompt templates, by name: the name goes into the manifest, and evaluation uses the one that training used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How a text becomes a prompt.

    Args:
        name: Name in the table.
        prompt: Text with `{text}`; the answer follows it directly.
        lead: What stands between prompt and answer, a blank for plain text.
        system: System turn; its presence means that the tokenizer's chat template is used.
    """

    name: str
    prompt: str
    lead: str = ""
    system: str | None = None

    def render(self, text: str, tokenizer: Any) -> str:
        """Return the whole prompt as text.

        Raises:
            ModelError: a chat template is needed, and the tokenizer has none or one that fails.
        """
        from jinja2.exceptions import TemplateError

        asked = self.prompt.format(text=text)
        if self.system is None:
            return asked
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"template '{self.name}' needs a tokenizer with a chat template. Use --template plain.")
        try:
            return _chat(tokenizer, self.system, asked)
        except TemplateError as error:
            raise ModelError(
                f"template '{self.name}' needs a chat template that takes a user turn, and the tokenizer's says: "
                f"{error}. Use --template plain."
            ) from error

    def encode(self, text: str, tokenizer: Any) -> list[int]:
        """Return the prompt's token ids, with the tokenizer's special tokens unless the chat template brings them."""
        rendered = self.render(text, tokenizer)
        ids: list[int] = tokenizer(rendered, add_special_tokens=self.system is None)["input_ids"]
        if self.system is None and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # tokenizers that close every text would end the answer before it began
        return ids

    def encode_answer(self, answer: str, tokenizer: Any) -> list[int]:
        """Return the answer's token ids, closed by the end-of-sequence token."""
        ids: list[int] = tokenizer(self.lead + answer, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]


def _chat(tokenizer: Any, system: str, user: str) -> str:
    from jinja2.exceptions import TemplateError

    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError:
        # some chat templates know no system turn
        joined = [{"role": "user", "content": f"{system}\n\n{user}"}]
        text = tokenizer.apply_chat_template(joined, add_generation_prompt=True, tokenize=False)
    return str(text)


_SYSTEM = (
    "Given a command from the user, a voice assistant will extract entities essential for carry out the command. "
    "Your task is to extract the entities as words from the command if they fall under a predefined list of "
    "entity types."
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="plain", prompt="Command: {text}\nSlots:", lead=" "),
        # Appendix D.2 of Liu and Niehues (ACL 2025), after He and Garner (2023); the wording is theirs
        Template(name="mid-align", prompt="{text}", system=_SYSTEM),
    )
}


def get_template(name: str) -> Template:
    """Return a template by name.

    Raises:
        PlanError: there is none of this name.
    """
    if name not in TEMPLATES:
        raise PlanError(f"--template must be one of {', '.join(TEMPLATES)}, got {name!r}.")
    return TEMPLATES[name]
