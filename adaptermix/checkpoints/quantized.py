"""Base models that are in 4 or 8 bits already, read as if they were whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..io.checkpoint_files import Checkpoint, TensorHeader
from ..io.safetensors_writer import DTYPE_NAMES
from .formats import EightBit, FourBit, Quantized
from .reading import config_of

_STATE = ".quant_state.bitsandbytes__"
_SCALES = "SCB"
_DTYPES = {str(dtype).removeprefix("torch."): name for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint(Checkpoint):
    """A checkpoint in a bitsandbytes format, with headers and tensors of the dequantised weights.

    Args:
        path: The folder.
        tensors: Header per weight and other tensor.
        format: `nf4`, `fp4` or `int8`.
        readers: Loader of each quantised weight.
        whole: The stored files.
    """

    format: str
    readers: Mapping[str, Callable[[], Quantized]]
    whole: Checkpoint

    def load(self, key: str) -> Tensor:
        """Read one tensor, dequantised as in a forward pass."""
        if key not in self.readers:
            return self.whole.load(self.aliases.get(key, key))
        quantized = self.readers[key]()
        return quantized.weight().to(quantized.dtype)


def as_whole(checkpoint: Checkpoint) -> Checkpoint:
    """Return a view of a checkpoint that dequantises its weights; an unquantised checkpoint is returned unchanged.

    Raises:
        ModelError: its weights are quantised in several formats, or not by bitsandbytes.
    """
    states = {name.partition(_STATE)[0]: name for name in checkpoint.tensors if _STATE in name}
    scales = {
        f"{name.removesuffix(_SCALES)}weight": name for name in checkpoint.tensors if name.endswith(f".{_SCALES}")
    }
    formats = {name.partition(_STATE)[2] for name in states.values()} | ({"int8"} if scales else set())
    if not formats:
        _check_whole(checkpoint)
        return checkpoint
    if len(formats) > 1:
        raise ModelError(
            f"{checkpoint.path}: quantised weights must be of one format, found {sorted(formats)}.",
            code="quantized.mixed-formats",
        )
    parts = {name for name in checkpoint.tensors if any(name.startswith(f"{weight}.") for weight in states)}
    companions = {f"{weight.removesuffix('weight')}weight_format" for weight in scales} | set(scales.values())
    headers: dict[str, TensorHeader] = {}
    readers: dict[str, Callable[[], Quantized]] = {}
    dtype = _config_dtype(checkpoint)
    for name, header in checkpoint.tensors.items():
        if name in states:
            state = _state(checkpoint, states[name])
            readers[name] = partial(_four_bit, checkpoint, name)
            headers[name] = replace(header, shape=tuple(state["shape"]), dtype=_DTYPES[state["dtype"]])
        elif name in scales:
            readers[name] = partial(_eight_bit, checkpoint, name, scales[name], dtype)
            headers[name] = replace(header, dtype=DTYPE_NAMES[dtype])
        elif name not in parts and name not in companions:
            headers[name] = header
    return QuantizedCheckpoint(
        path=checkpoint.path, tensors=headers, format=formats.pop(), readers=readers, whole=checkpoint
    )


def _check_whole(checkpoint: Checkpoint) -> None:
    method = (config_of(checkpoint).get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise ModelError(
            f"the base model must be in whole precision or in bitsandbytes' 4 or 8 bits, and {checkpoint.path} is "
            f"quantised by '{method}'. Give the model that it was made from.",
            code="quantized.format",
        )


def _config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    config = config_of(checkpoint)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    dtype: Any = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(bytes(checkpoint.load(name).tolist()))
        if state["dtype"] in _DTYPES and len(state["shape"]) == 2:
            return state
    except (ValueError, KeyError, TypeError):
        pass
    raise ModelError(
        f"{checkpoint.path}: '{name}' must hold bitsandbytes' state of a matrix, and does not.", code="quantized.state"
    )


def _four_bit(checkpoint: Checkpoint, name: str) -> FourBit:
    names = [other for other in checkpoint.tensors if other.startswith(f"{name}.")]
    parts = {other.removeprefix(f"{name}."): checkpoint.load(other) for other in names}
    return FourBit.read(checkpoint.load(name), parts)


def _eight_bit(checkpoint: Checkpoint, name: str, scales: str, dtype: torch.dtype) -> EightBit:
    return EightBit.of_steps(checkpoint.load(name), checkpoint.load(scales), dtype)
