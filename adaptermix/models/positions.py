"""The number of positions of a model, and prompts that are cut to fit."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, TypeVar, cast

from torch import nn

from ..options import TrainingSettings
from ..progress import Watcher
from .stack import Projected

if TYPE_CHECKING:
    from transformers import PreTrainedModel

S = TypeVar("S", bound=TrainingSettings)

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""Last names of the modules with one vector per position."""


def positions_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read at once; None if its configuration sets no limit.

    Position tables may have unusable entries: those of RoBERTa and its relatives (XLM-R) start after the padding
    token's number, and those of OPT after an offset. The encoder of a stack limits the stack, too.
    """
    config = model.config.get_text_config()
    limits = [value for name in _NAMES if isinstance(value := getattr(config, name, None), int) and value > 0]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding):
            unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused)
        if isinstance(module, Projected) and module.reads_rows:
            limits += filter(None, [positions_of(cast("PreTrainedModel", module.encoder))])
    return min(limits, default=None)


def readable(model: PreTrainedModel, length: int) -> int:
    """Return a length in tokens, limited to the model's number of positions."""
    return min(length, positions_of(model) or length)


def within_positions(model: PreTrainedModel, settings: S, watch: Watcher) -> S:
    """Limit `max_length` of training settings to the model's positions; `watch` receives a note if it changed."""
    length = readable(model, settings.max_length)
    if length == settings.max_length:
        return settings
    watch.note(f"this base model has {length} positions, so --max-length {settings.max_length} becomes {length}.")
    return settings.model_copy(update={"max_length": length})


def shortened(prompt: list[int], room: int, special: Set[int]) -> list[int]:
    """Return a prompt of at most `room` tokens, cut after its opening special tokens; its last token always stays."""
    if len(prompt) <= room:
        return prompt
    opening = next((index for index, token in enumerate(prompt) if token not in special), len(prompt))
    opening = min(opening, room - 1)
    return prompt[:opening] + prompt[opening - room :]
