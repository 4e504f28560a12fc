"""Checkpoints of quantised models, read as if they were whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from ...io.checkpoint_files import Checkpoint, config_of
from .base import FORMATS, Format, Quantized, Readable, StoredFormat, known_formats
from .zero_points import READ_ONLY

_PACKAGES = {"gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors"}
"""Packages with which transformers loads further forms of a quantisation method."""


@dataclass(frozen=True, kw_only=True)
class DequantizedCheckpoint(Checkpoint):
    """A checkpoint in a quantised format, with headers and tensors of the dequantised weights.

    Args:
        path: The folder.
        tensors: Header per weight and other tensor.
        format: Name of the format, such as `gptq`.
        readers: Loader of each quantised weight.
        whole: The stored files.
    """

    format: str
    readers: Mapping[str, Callable[[], Readable]]
    whole: Checkpoint

    def load(self, key: str) -> Tensor:
        """Read one tensor, dequantised as in a forward pass."""
        if key not in self.readers:
            return self.whole.load(self.aliases.get(key, key))
        quantized = self.readers[key]()
        return quantized.weight().to(quantized.dtype)


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint(DequantizedCheckpoint):
    """A checkpoint in a format that is also written, such as `nf4`, so that its codes can stay."""

    readers: Mapping[str, Callable[[], Quantized]]


def as_whole(checkpoint: Checkpoint) -> Checkpoint:
    """Return a view of a checkpoint that dequantises its weights; an unquantised checkpoint is returned unchanged.

    Raises:
        ModelError: its weights are quantised in several formats, or in an unknown one.
    """
    stored = _stored(checkpoint)
    by_format = _weights(checkpoint, FORMATS)
    if not by_format and stored:
        by_format = _weights(checkpoint, known_formats())
    formats: dict[str, StoredFormat] = {name: FORMATS[name] for name in by_format}
    if not by_format and (form := next((one for one in READ_ONLY if one.is_config(stored)), None)):
        formats = {form.name: form}
        by_format = _weights(checkpoint, formats)
    if not by_format:
        if stored:
            raise _unknown(checkpoint.path, stored)
        return checkpoint
    if len(by_format) > 1:
        raise ModelError(
            f"{checkpoint.path}: quantised weights must be of one format, found {sorted(by_format)}.",
            code="quantized.mixed-formats",
        )
    name, weights = by_format.popitem()
    form, dtype = formats[name], _config_dtype(checkpoint)
    # Other forms of compressed-tensors have tensors of the same names, such as packed words with 8 bits.
    if stored.get("quant_method") == "compressed-tensors" and not form.is_config(stored):
        raise _unknown(checkpoint.path, stored)
    parts = {part for weight in weights for part in form.parts(weight, checkpoint.tensors)}
    tensors = {key: header for key, header in checkpoint.tensors.items() if key not in parts - weights}
    tensors |= {key: form.header(checkpoint, key, dtype) for key in weights}
    view: type[Any] = QuantizedCheckpoint if isinstance(form, Format) else DequantizedCheckpoint
    made: Checkpoint = view(
        path=checkpoint.path,
        tensors=dict(sorted(tensors.items())),
        format=name,
        readers={key: partial(form.read, checkpoint, key, dtype) for key in sorted(weights)},
        whole=checkpoint,
    )
    return made


def dequantized_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint; quantised weights are dequantised in float32 and rounded once.

    Args:
        checkpoint: A view of `as_whole`.
        dtype: Dtype of dequantised weights; None for that of the model's config.
    """
    readers = checkpoint.readers if isinstance(checkpoint, DequantizedCheckpoint) else {}
    tensors = {}
    for name in checkpoint.tensors:
        weight = readers[name]() if name in readers else None
        tensors[name] = checkpoint.load(name) if weight is None else weight.weight().to(dtype or weight.dtype)
    return tensors


def dequantized_on_loading(stored: Mapping[str, object], path: str) -> bool:
    """Return whether this package dequantises models of a quantisation config itself, so that no other is needed.

    Args:
        stored: The quantisation config.
        path: The model, for messages.

    Raises:
        ModelError: neither this package nor transformers with the installed packages can load such a model.
    """
    forms = [form for form in known_formats().values() if form.package is None]
    if any(form.is_config(stored) for form in (*forms, *READ_ONLY)):
        return True
    package = _PACKAGES.get(str(stored.get("quant_method")))
    if package is not None and find_spec(package) is None:
        raise _unknown(path, stored)
    return False


def _stored(checkpoint: Checkpoint) -> Mapping[str, object]:
    """Return the quantisation config of a checkpoint; empty without one."""
    stored = config_of(checkpoint).get("quantization_config")
    return stored if isinstance(stored, Mapping) and stored.get("quant_method") else {}


def _unknown(path: str | Path, stored: Mapping[str, object]) -> ModelError:
    return ModelError(
        "the base model must be in whole precision, in bitsandbytes' 4 or 8 bits, or in 4 bits of compressed-tensors "
        f"(symmetric), GPTQ or AWQ (gemm), and {path} is in another form of '{stored['quant_method']}'. Give "
        "the model that it was made from.",
        code="quantized.format",
    )


def _weights(checkpoint: Checkpoint, formats: Mapping[str, StoredFormat]) -> dict[str, set[str]]:
    """Return the names of the quantised weights of a checkpoint by the names of their formats."""
    by_format: dict[str, set[str]] = {}
    for name, form in formats.items():
        if weights := set(filter(None, map(form.weight_of, checkpoint.tensors))):
            by_format[name] = weights
    return by_format


def _config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    config = config_of(checkpoint)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    dtype: object = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16
