"""How many rows one forward pass should have."""

from __future__ import annotations

import psutil
import torch

from ..models import BaseModel

USUAL = 32
"""Rows of a pass where nothing is known of the model."""
_MOST_ON_CPU, _MOST_ON_GPU = 256, 1024
_SHARE_ON_CPU, _SHARE_ON_GPU = 0.25, 0.5
"""Share of the free memory that the states of a pass may take."""
_MOST_BYTES_ON_CPU = 4 * 2**30


def _free_bytes(base: BaseModel) -> float:
    if base.device.type == "cuda":
        return _SHARE_ON_GPU * torch.cuda.mem_get_info(base.device)[0]
    return min(_MOST_BYTES_ON_CPU, _SHARE_ON_CPU * psutil.virtual_memory().available)


def bytes_of_row(base: BaseModel, length: int) -> int | None:
    """Return about what a row of this many tokens takes while it is generated; None if the model does not tell.

    Keys and values of all layers, the widest states of one layer, logits of one place.
    """
    config = base.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not (heads and layers and hidden):
        return None
    size = base.model.dtype.itemsize
    key = (getattr(config, "head_dim", None) or hidden // heads) * (
        getattr(config, "num_key_value_heads", None) or heads
    )
    wide = hidden + 2 * (getattr(config, "intermediate_size", None) or 4 * hidden) + heads * length
    return int(length * size * (2 * layers * key + wide) + config.vocab_size * (size + 4))


def rows_that_fit(base: BaseModel, length: int) -> int:
    """Return rows per pass: as many as make it no faster yet, and fit the free memory.

    Args:
        base: The model.
        length: Tokens of the longest row, prompt and answer.
    """
    each = bytes_of_row(base, length)
    most = _MOST_ON_GPU if base.device.type == "cuda" else _MOST_ON_CPU
    return USUAL if each is None else max(1, min(most, int(_free_bytes(base) / each)))
