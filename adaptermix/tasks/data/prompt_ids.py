"""Prompts as token ids: of a model's tokenizer, or of the two tokenizers of a stack that generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...models.mixed_rows import MixedRows
from ...models.positions import shortened
from ..prompts import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptIds:
    """Prompts as token ids for a model.

    Args:
        tokenizer: The model's tokenizer.
        mixed: How a stack that generates reads prompts; None for other models.
    """

    tokenizer: PreTrainedTokenizerBase
    mixed: MixedRows | None = None

    def encode(self, template: Template, fields: Mapping[str, object], language: str) -> list[int]:
        """Return the ids of a prompt.

        Args:
            template: How the prompt is made.
            fields: The values of its placeholders.
            language: Language of the row, for encoders of stacks that read a language tag.

        Raises:
            ModelError: the template needs a chat template that the tokenizer lacks, or the encoder of a stack has no
                tag for the language.
        """
        ids = template.encode(fields, self.tokenizer)
        if self.mixed is None:
            return ids
        foreign = self.mixed.read(template.render(fields, self.tokenizer), language)
        return self.mixed.prompt(foreign, ids, self.tokenizer.bos_token_id)

    def shortened(self, prompt: list[int], room: int) -> list[int]:
        """Return a prompt of at most `room` tokens, without its beginning but with its opening special tokens."""
        if self.mixed:
            return self.mixed.shortened(prompt, room, self.tokenizer)
        return shortened(prompt, room, set(self.tokenizer.all_special_ids))

    def decode(self, prompt: list[int]) -> str:
        """Return the text of a prompt."""
        return self.mixed.decode(prompt, self.tokenizer) if self.mixed else str(self.tokenizer.decode(prompt))
