"""Base models that are in 4 or 8 bits already, read as if they were whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import ModelError
from ..io.checkpoint_files import Checkpoint
from ..models.formats import FORMATS, Format, Quantized, known_formats
from .reading import config_of


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint(Checkpoint):
    """A checkpoint in a quantised format, with headers and tensors of the dequantised weights.

    Args:
        path: The folder.
        tensors: Header per weight and other tensor.
        format: Name of the format, such as `nf4`.
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
        ModelError: its weights are quantised in several formats, or in an unknown one.
    """
    method = (config_of(checkpoint).get("quantization_config") or {}).get("quant_method")
    by_format = _weights(checkpoint, FORMATS)
    if not by_format and method is not None:
        by_format = _weights(checkpoint, known_formats())
    if not by_format:
        if method is not None:
            raise ModelError(
                f"the base model must be in whole precision or in bitsandbytes' 4 or 8 bits, and {checkpoint.path} is "
                f"quantised by '{method}'. Give the model that it was made from.",
                code="quantized.format",
            )
        return checkpoint
    if len(by_format) > 1:
        raise ModelError(
            f"{checkpoint.path}: quantised weights must be of one format, found {sorted(by_format)}.",
            code="quantized.mixed-formats",
        )
    name, weights = by_format.popitem()
    form, dtype = FORMATS[name], _config_dtype(checkpoint)
    parts = {part for weight in weights for part in form.parts(weight, checkpoint.tensors)}
    return QuantizedCheckpoint(
        path=checkpoint.path,
        tensors={
            key: form.header(checkpoint, key, dtype) if key in weights else header
            for key, header in checkpoint.tensors.items()
            if key not in parts
        },
        format=name,
        readers={key: partial(form.read, checkpoint, key, dtype) for key in checkpoint.tensors if key in weights},
        whole=checkpoint,
    )


def _weights(checkpoint: Checkpoint, formats: Mapping[str, Format]) -> dict[str, set[str]]:
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
