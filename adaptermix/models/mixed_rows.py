"""Rows of a stack that generates: states of a multilingual encoder E, then tokens of the model M.

Such a row has one id space: ids below V, the number of M's embeddings, are M's, and V + i is E's token i. E's tokens of
a row are one run, which the border ends: a trained vector. With mode "replace" M reads E's states of a prompt and
generates the answer (LangBridge); with "augment" it reads them and then the prompt in its own tokens (MindMerger).

An answer has M's ids only, so caches and generation work as without a stack.

Reference: Yoon et al., LangBridge, ACL 2024, arXiv 2401.10695, section 3; Huang et al., MindMerger, NeurIPS 2024, arXiv
2405.17386, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .encoders import width_of
from .languages import Tagged, language_tags
from .positions import positions_of, shortened
from .stack import Projected, padding_of, replace_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAST = 4
"""A mixed prompt that is cut to fewer tokens is only its last tokens."""


class MixedEmbeddings(Projected):
    """The embeddings of mixed rows: of the encoder's states, of the border, or the model's own.

    Args:
        encoder: E, as in `Projected`.
        embeddings: The model's own embeddings.
        width: Width of E's states.
        pad_id: Id of E's padding token.
        border: Id of the border, V + the number of E's embeddings.

    Attributes:
        border: The trained vector of the border, an embedding of one entry.
        offset: V, the number of the model's embeddings.
        border_id: Id of the border.

    Shapes: ids [rows tokens]; returns [rows tokens own_width], as for `Projected`.
    """

    reads_rows = False  # the encoder's part of a row is cut by `MixedRows`

    def __init__(self, encoder: nn.Module, embeddings: nn.Module, *, width: int, pad_id: int, border: int) -> None:
        super().__init__(encoder, embeddings, width=width, pad_id=pad_id)
        self.offset, own_width = self.weight.shape
        self.border_id = border
        self.border = nn.Embedding(1, own_width)
        embeddings.requires_grad_(False)

    def stored(self) -> dict[str, nn.Parameter]:
        return {**super().stored(), "border": cast(nn.Parameter, self.border.weight)}

    def forward(self, ids: Tensor) -> Tensor:
        foreign = ids >= self.offset
        vectors = self.read_own(ids.masked_fill(foreign, 0))
        if not foreign.any():
            return vectors
        border = ids == self.border_id
        run = foreign & ~border
        if run.any():
            vectors = _put(vectors, run, self.project(self._states(ids, run)))
        return _put(vectors, border, self.border.weight.expand(int(border.sum()), -1))

    def _states(self, ids: Tensor, run: Tensor) -> Tensor:
        """Return the encoder's states of its tokens, row after row, [tokens width].

        Each row's tokens are moved to its front, so that the encoder reads no other ones.
        """
        counts = run.sum(1)
        counts = counts[counts > 0]
        there = torch.arange(int(counts.max()), device=ids.device) < counts[:, None]
        texts = torch.full(there.shape, self.pad_id, device=ids.device, dtype=ids.dtype)
        texts[there] = ids[run] - self.offset
        return self.encoder_states(texts, there.long())[there]


def _put(vectors: Tensor, mask: Tensor, others: Tensor) -> Tensor:
    """Return the vectors with others where the mask is true, in the order of the rows."""
    return vectors.masked_scatter(mask.unsqueeze(-1), others.to(vectors.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRows:
    """How a stack that generates reads a prompt.

    Args:
        reader: E's tokenizer.
        offset: First id of E's tokens.
        border: Id that ends them.
        longest: Most tokens that E reads; None if it sets no limit.
        augments: Whether M reads the prompt in its own tokens as well.
    """

    reader: Tagged
    offset: int
    border: int
    longest: int | None
    augments: bool

    def read(self, text: str, language: str) -> list[int]:
        """Return E's tokens of a text, by their ids in E's tokenizer; of a long text the last ones.

        Args:
            text: The text.
            language: Its language, or the pair of a translation, whose first language is the text's.

        Raises:
            ModelError: E's tokenizer writes language tags, and there is no tag for the language.
        """
        if self.reader.without_tag([language]) is not None:
            raise ModelError(
                f"the encoder of the stack reads a language tag with each text, and has no tag for {language!r}. Leave "
                "the language out, or name a related language with LANGUAGE=FILE.",
                code="model.language",
            )
        (row,) = self.reader.encode([text], [language], verbose=False)
        ids: list[int] = row["input_ids"]
        return shortened(ids, self.longest or len(ids), set(self.reader.tokenizer.all_special_ids))

    def prompt(self, foreign: Sequence[int], plain: Sequence[int], bos: int | None) -> list[int]:
        """Return the ids of a prompt: the start token if M's prompt has one, E's tokens, the border, and M's tokens.

        Args:
            foreign: Ids of E's tokenizer.
            plain: M's ids of the prompt.
            bos: M's start token, if it has one.
        """
        start = list(plain[:1]) if plain and plain[0] == bos else []
        rest = plain[len(start) :] if self.augments else []
        return [*start, *(self.offset + each for each in foreign), self.border, *rest]

    def split(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return E's tokens of a prompt, by their ids in E's tokenizer, and M's tokens."""
        foreign = [each - self.offset for each in prompt if self.offset <= each < self.border]
        return foreign, [each for each in prompt if each < self.offset]

    def shortened(self, prompt: Sequence[int], room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return a prompt of at most `room` tokens; the readings of both models lose their beginnings.

        E's reading takes at most half of the room, or what M's reading leaves.

        Args:
            prompt: The prompt.
            room: Most tokens.
            tokenizer: M's tokenizer.
        """
        if len(prompt) <= room or room < _LEAST:
            return list(prompt[-room:])
        foreign, plain = self.split(prompt)
        share = max((room - 1) // 2, room - 1 - len(plain))
        foreign = shortened(foreign, share, set(self.reader.tokenizer.all_special_ids))
        plain = shortened(plain, room - 1 - len(foreign), set(tokenizer.all_special_ids))
        start = plain[0] if plain and plain[0] == prompt[0] else None
        return self.prompt(foreign, plain, start)

    def decode(self, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text of a prompt as E reads it, then as M reads it; M's tokenizer is `tokenizer`."""
        foreign, plain = self.split(prompt)
        return f"{self.reader.tokenizer.decode(foreign)}\n{tokenizer.decode(plain)}"


def mount_mixed(
    model: PreTrainedModel, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, augments: bool
) -> MixedRows:
    """Put an encoder under a language model that generates, in place, and return how it reads prompts.

    Args:
        model: The language model.
        encoder: The encoder.
        tokenizer: The encoder's tokenizer.
        augments: See `MixedRows`.

    Raises:
        ModelError: the encoder's tokenizer has no padding token.
    """
    pad_id = padding_of(tokenizer)
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    offset = len(embeddings.weight)
    border = offset + max(len(tokenizer), len(cast(nn.Embedding, encoder.get_input_embeddings()).weight))
    embedding = MixedEmbeddings(encoder, embeddings, width=width_of(encoder.config), pad_id=pad_id, border=border)
    replace_embeddings(model, embedding)
    return MixedRows(
        reader=Tagged(tokenizer=tokenizer, tags=language_tags(tokenizer)),
        offset=offset,
        border=border,
        longest=positions_of(encoder),
        augments=augments,
    )
