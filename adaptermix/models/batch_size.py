"""How many rows one forward pass should have."""

from __future__ import annotations

import inspect
from typing import Any

from ..io.memory import free_memory
from .base import BaseModel

USUAL = 32
"""Rows of a pass where nothing is known of the model."""
_MOST_ON_CPU, _MOST_ON_GPU = 256, 1024
_SHARE_ON_CPU, _SHARE_ON_GPU = 0.25, 0.5
"""Share of the free memory that the states of a pass may take."""
_MOST_BYTES_ON_CPU = 4 * 2**30


def _free_bytes(base: BaseModel) -> float:
    free = free_memory(base.device)
    return _SHARE_ON_GPU * free if base.device.type == "cuda" else min(_MOST_BYTES_ON_CPU, _SHARE_ON_CPU * free)


def _most(config: Any, *names: str) -> int:
    """Return the largest of what a config says under these names, where each may be one number or one per layer."""
    found = [getattr(config, name, None) for name in names]
    numbers = [number for value in found for number in (value if isinstance(value, list | tuple) else [value])]
    return max((number for number in numbers if isinstance(number, int)), default=0)


def bytes_of_row(base: BaseModel, length: int) -> int | None:
    """Return about what a row of this many tokens takes while it is generated; None if the model does not tell.

    Keys and values of all layers, the widest states of one layer, logits of one place.
    """
    try:
        config = base.model.config.get_text_config()
        layers, hidden = _most(config, "num_hidden_layers"), _most(config, "hidden_size")
        heads, vocabulary = _most(config, "num_attention_heads"), _most(config, "vocab_size")
        each = _most(config, "head_dim", "v_head_dim", "qk_head_dim") or hidden // max(heads, 1)
        width = each * (_most(config, "num_key_value_heads") or heads)
        inner = _most(config, "intermediate_size") or 4 * hidden
    except (AttributeError, TypeError, ValueError, RuntimeError):  # configs that have no one value for all layers
        return None
    told = "logits_to_keep" in inspect.signature(base.model.forward).parameters
    if not (told and layers and hidden and heads and vocabulary):
        return None
    size = base.model.dtype.itemsize
    return int(length * size * (2 * layers * width + hidden + 2 * inner + heads * length) + vocabulary * (size + 4))


def rows_that_fit(base: BaseModel, length: int) -> int:
    """Return rows per pass, a power of two: as many as make it no faster yet, and fit the free memory.

    Args:
        base: The model.
        length: Tokens of the longest row: prompt, answer, and a draft that fails.
    """
    each = bytes_of_row(base, length)
    most = _MOST_ON_GPU if base.device.type == "cuda" else _MOST_ON_CPU
    fitting = USUAL if each is None else max(1, min(most, int(_free_bytes(base) / each)))
    return int(2 ** (fitting.bit_length() - 1))
