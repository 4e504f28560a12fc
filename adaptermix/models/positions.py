"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from ..options import TrainingSettings
from ..progress import Watcher
from .base import BaseModel

S = TypeVar("S", bound=TrainingSettings)

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""Last names of the modules that hold one vector for each position."""


def positions_of(model: Any) -> int | None:
    """Return how many tokens a model of transformers can read at once, None where its configuration sets no limit.

    Where positions are looked up in a table, some of its entries may be no positions: those of RoBERTa and its
    relatives (XLM-R) begin behind the padding token's number, those of OPT behind an offset.
    """
    config = model.config.get_text_config()
    limits = [value for name in _NAMES if isinstance(value := getattr(config, name, None), int) and value > 0]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding):
            unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused)
    return min(limits, default=None)


def readable(base: BaseModel, length: int) -> int:
    """Return a length in tokens, or the number of positions of the model if that is less."""
    return min(length, positions_of(base.model) or length)


def within_positions(base: BaseModel, settings: S, watch: Watcher) -> S:
    """Return training settings whose `max_length` the model can read; `watch` receives a note if it could not."""
    length = readable(base, settings.max_length)
    if length == settings.max_length:
        return settings
    watch.note(f"this base model has {length} positions, so that --max-length {settings.max_length} becomes {length}.")
    return settings.model_copy(update={"max_length": length})
