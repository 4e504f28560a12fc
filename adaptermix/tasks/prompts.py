"""Prompt templates: the name goes into the manifest, and evaluation uses the one that training used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How a row becomes a prompt.

    Args:
        name: Name in the task's table.
        prompt: Text with the task's placeholders, such as `{text}`; the answer follows it directly.
        lead: Text between prompt and answer, a blank for plain text.
        chat: Use the tokenizer's chat template.
        system: System turn of the chat, with placeholders too.
        turns: In a chat, the field with the whole conversation as (role, content), instead of `system` and `prompt`.
        answers: The field that maps an answer to its text after this prompt; None if the text is the answer itself.
        broken_after: In a chat, text after which a line break is inserted wherever the chat template writes it.
    """

    name: str
    prompt: str
    lead: str = ""
    chat: bool = False
    system: str | None = None
    turns: str | None = None
    answers: str | None = None
    broken_after: str | None = None

    def render(self, fields: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the whole prompt as text.

        Raises:
            ModelError: a chat template is needed, but the tokenizer lacks it or it fails.
        """
        from jinja2.exceptions import TemplateError

        if not self.chat:
            return self.prompt.format_map(fields)
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"template '{self.name}' needs a tokenizer with a chat template. Use --template plain.",
                code="template.no-chat",
            )
        turns = self._conversation(fields)
        try:
            text = _chat(tokenizer, turns)
        except (TemplateError, *_FAULTS) as error:
            raise ModelError(
                f"template '{self.name}' needs a chat template that takes {_roles(turns)}, but the tokenizer's "
                f"fails: {error}. Use --template plain.",
                code="template.roles",
            ) from error
        if self.broken_after is None:
            return text
        if self.broken_after not in text:
            raise ModelError(
                f"template '{self.name}' needs a chat template that writes {self.broken_after}, and the tokenizer's "
                "does not. Use --template mid-align.",
                code="template.writes",
            )
        return text.replace(self.broken_after, f"{self.broken_after}\n")

    def _conversation(self, fields: Mapping[str, object]) -> list[dict[str, str]]:
        if self.turns is not None and isinstance(turns := fields[self.turns], Sequence):
            return [{"role": role, "content": content} for role, content in turns]
        system = [] if self.system is None else [{"role": "system", "content": self.system.format_map(fields)}]
        return [*system, {"role": "user", "content": self.prompt.format_map(fields)}]

    def encode(self, fields: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the prompt's token ids.

        They start with the start token if the tokenizer puts one before a text, once, whether the chat template
        adds it or not.
        """
        rendered = self.render(fields, tokenizer)
        ids: list[int] = tokenizer(rendered, add_special_tokens=not self.chat)["input_ids"]
        if self.chat:
            starts = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
            return [tokenizer.bos_token_id, *ids] if starts and ids[:1] != [tokenizer.bos_token_id] else ids
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers append the end token to every text, so that the answer would be empty
        return ids

    def text_of(self, answer: str, fields: Mapping[str, object]) -> str:
        """Return the text of an answer after this prompt."""
        if self.answers is None:
            return answer
        texts = cast("Mapping[str, str]", fields[self.answers])
        return texts[answer]

    def encode_answer(self, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the answer's token ids, followed by the token that ends it (a turn's in a chat, else a text's)."""
        ids: list[int] = tokenizer(self.lead + answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.end(tokenizer)]

    def end(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the token that ends an answer."""
        turn = _turn_end(tokenizer, str(tokenizer.chat_template)) if self.chat else None
        end: int = tokenizer.eos_token_id if turn is None else turn
        return end


_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors that a chat template may raise besides those of Jinja, since Python evaluates its expressions."""


def _roles(turns: Sequence[Mapping[str, str]]) -> str:
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    return "a user turn" if roles == ["user"] else f"the turns {', '.join(roles)}"


_ANSWER = "0123456789"
"""An answer that chat templates do not change."""


@lru_cache(maxsize=16)
def _turn_end(tokenizer: PreTrainedTokenizerBase, _chat_template: str) -> int | None:
    """Return the token that a chat template puts after an answer, None if it is not a special token.

    It may be another token than the one that ends a text: `<|im_end|>` and `<|endoftext|>`, say.
    """
    from jinja2.exceptions import TemplateError

    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, **_QUIET))
    except (TemplateError, *_FAULTS):
        return None
    ids = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    index = next((index for index, token in enumerate(ids) if token in special), None)
    # Only blanks may precede it.
    return None if index is None or tokenizer.decode(ids[:index]).strip() else ids[index]


_QUIET = {"enable_thinking": False, "thinking": False}
"""Arguments that make models answer without a chain of thought; other chat templates ignore them."""
_THINK, _DONE = "<think>", "\n\n</think>\n\n"


def _chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> str:
    from jinja2.exceptions import TemplateError

    def render(turns: Sequence[Mapping[str, str]]) -> str:
        text = str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False, **_QUIET))
        # Some templates always open a thought. It is closed here, so that the answer follows.
        return f"{text.rstrip()}{_DONE}" if text.rstrip().endswith(_THINK) else text

    try:
        return render(turns)
    except TemplateError:
        if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
            raise
        # Some chat templates do not support a system turn.
        joined = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        return render([joined, *turns[2:]])


def table(*templates: Template) -> Mapping[str, Template]:
    """Return templates by name, the default first."""
    return {template.name: template for template in templates}
