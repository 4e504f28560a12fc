"""The number of rows per forward pass."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from ..io.memory import free_memory
from .base import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

USUAL = 32
"""Rows per pass if the model's memory use is unknown."""
_MOST_ON_CPU, _MOST_ON_GPU = 256, 1024
_SHARE_ON_CPU, _SHARE_ON_GPU = 0.25, 0.5
"""Largest share of the free memory that the states of a pass may use."""
_MOST_BYTES_ON_CPU = 4 * 2**30


def _free_bytes(base: BaseModel) -> float:
    free = free_memory(base.device)
    return _SHARE_ON_GPU * free if base.device.type == "cuda" else min(_MOST_BYTES_ON_CPU, _SHARE_ON_CPU * free)


def _most(config: PreTrainedConfig, *names: str) -> int:
    """Return the largest value that a config has under these names, which may be one number or one per layer."""
    values = [getattr(config, name, None) for name in names]
    numbers = [number for value in values for number in (value if isinstance(value, list | tuple) else [value])]
    return max((number for number in numbers if isinstance(number, int)), default=0)


def bytes_of_row(base: BaseModel, length: int) -> int | None:
    """Return the approximate memory of generating a row of this length; None if the config does not determine it.

    It counts keys and values of all layers, the widest states of one layer, and the logits of one position.
    """
    try:
        config = base.model.config.get_text_config()
        layers, hidden = _most(config, "num_hidden_layers"), _most(config, "hidden_size")
        heads, vocabulary = _most(config, "num_attention_heads"), _most(config, "vocab_size")
        each = _most(config, "head_dim", "v_head_dim", "qk_head_dim") or hidden // max(heads, 1)
        width = each * (_most(config, "num_key_value_heads") or heads)
        inner = _most(config, "intermediate_size") or 4 * hidden
    except (AttributeError, TypeError, ValueError, RuntimeError):  # Some configs have no single value for all layers.
        return None
    limits_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters
    if not (limits_logits and layers and hidden and heads and vocabulary):
        return None
    size = base.model.dtype.itemsize
    return int(length * size * (2 * layers * width + hidden + 2 * inner + heads * length) + vocabulary * (size + 4))


def rows_that_fit(base: BaseModel, length: int) -> int:
    """Return the number of rows per pass: the largest power of two that fits the free memory, up to a useful limit.

    Args:
        base: The model.
        length: Tokens of the longest row: prompt, answer, and a rejected draft.
    """
    each = bytes_of_row(base, length)
    most = _MOST_ON_GPU if base.device.type == "cuda" else _MOST_ON_CPU
    fitting = USUAL if each is None else max(1, min(most, int(_free_bytes(base) / each)))
    return int(2 ** (fitting.bit_length() - 1))
