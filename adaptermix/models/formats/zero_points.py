"""Weights of GPTQ and AWQ models, which are read only: 4-bit integers minus a zero point, times a scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ...errors import ModelError
from ...io.checkpoint_files import Checkpoint, TensorHeader, config_of
from ...io.safetensors_writer import DTYPE_NAMES
from .base import StoredFormat
from .words import PER_WORD, unpack_words

_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Position in a word of AWQ of each of eight consecutive columns: words hold columns 0, 2, 4, 6, 1, 3, 5, 7."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine:
    r"""A weight $W_{oi} = s_{go} (q_{oi} - z_{go})$, with g the group of input i.

    Args:
        codes: The integers q, 0 to 15.
        zeros: Zero points z per group and output.
        scales: Scales s.
        groups: Group g of each input.
        dtype: Dtype of the weight in a forward pass.
    """

    codes: Integer[Tensor, "out in"]
    zeros: Integer[Tensor, "groups out"]
    scales: Float[Tensor, "groups out"]
    groups: Integer[Tensor, " in"]
    dtype: torch.dtype

    def weight(self) -> Float[Tensor, "out in"]:
        """Return the dequantised weight in float32."""
        steps = self.codes.float() - self.zeros.float()[self.groups].T
        return steps * self.scales.float()[self.groups].T


class _Sizes(NamedTuple):
    """Sizes of a weight."""

    into: int
    out: int
    groups: int


class _WithZeros(StoredFormat):
    """What GPTQ and AWQ share: the tensors `qweight`, `qzeros` and `scales` of a weight."""

    def weight_of(self, tensor: str) -> str | None:
        return f"{tensor.removesuffix('qweight')}weight" if tensor.endswith(".qweight") else None

    def parts(self, weight: str, tensors: Iterable[str]) -> set[str]:  # noqa: ARG002
        stem = weight.removesuffix("weight")
        return {f"{stem}{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}

    def header(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> TensorHeader:
        stem = weight.removesuffix("weight")
        sizes = self._sizes(checkpoint, stem)
        packed = checkpoint.tensors[f"{stem}qweight"]
        return replace(packed, shape=(sizes.out, sizes.into), dtype=DTYPE_NAMES[dtype])

    def _is_packed(self, shape: tuple[int, ...], sizes: _Sizes) -> bool:
        """Return whether the packed weight has the shape of a weight of these sizes."""
        raise NotImplementedError

    def _into(self, packed: tuple[int, ...]) -> int:
        """Return the number of inputs of a packed weight."""
        raise NotImplementedError

    def _sizes(self, checkpoint: Checkpoint, stem: str) -> _Sizes:
        headers = [checkpoint.tensors.get(f"{stem}{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
        packed, zeros, scales, order = headers
        if packed and zeros and scales and packed.dtype == zeros.dtype == "I32" and len(scales.shape) == 2:
            groups, out = scales.shape
            sizes = _Sizes(self._into(packed.shape), out, groups)
            is_grouped = order.shape == (sizes.into,) if order else bool(groups) and sizes.into % groups == 0
            if self._is_packed(packed.shape, sizes) and zeros.shape == (groups, out // PER_WORD) and is_grouped:
                return sizes
        raise ModelError(
            f"{checkpoint.path}: '{stem}qweight' must be int32 with zero points and scales that match it, as "
            f"{self.name} stores 4 bits, and is not. Fetch the model again, or give the model that it was made from.",
            code="quantized.affine-tensors",
        )


class GptqFormat(_WithZeros):
    """GPTQ in 4 bits, packed along the inputs.

    In files of the first version (`checkpoint_format` gptq) stored zero points are 1 less than those that apply; in
    `gptq_v2` they are equal.

    Reference: Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323.
    """

    name = "gptq"

    def is_config(self, stored: Mapping[str, object]) -> bool:
        is_packed = stored.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
        return stored.get("quant_method") == "gptq" and stored.get("bits") == 4 and is_packed

    def _into(self, packed: tuple[int, ...]) -> int:
        return packed[0] * PER_WORD

    def _is_packed(self, shape: tuple[int, ...], sizes: _Sizes) -> bool:
        return shape == (sizes.into // PER_WORD, sizes.out)

    def read(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> Affine:
        stem = weight.removesuffix("weight")
        sizes = self._sizes(checkpoint, stem)
        stored = config_of(checkpoint).get("quantization_config") or {}
        offset = 0 if stored.get("checkpoint_format") == "gptq_v2" else 1
        order = f"{stem}g_idx"
        return Affine(
            codes=unpack_words(checkpoint.load(f"{stem}qweight").T),
            zeros=unpack_words(checkpoint.load(f"{stem}qzeros")) + offset,
            scales=checkpoint.load(f"{stem}scales"),
            groups=checkpoint.load(order).long() if order in checkpoint.tensors else _in_order(sizes),
            dtype=dtype,
        )


class AwqFormat(_WithZeros):
    """AWQ in 4 bits with the layout `gemm`, packed along the outputs.

    Reference: Lin et al., AWQ, MLSys 2024, arXiv 2306.00978.
    """

    name = "awq"

    def is_config(self, stored: Mapping[str, object]) -> bool:
        version = str(stored.get("version", "gemm")).lower()
        is_plain = version == "gemm" and stored.get("zero_point", True) is True
        return stored.get("quant_method") == "awq" and stored.get("bits") == 4 and is_plain

    def _into(self, packed: tuple[int, ...]) -> int:
        return packed[0]

    def _is_packed(self, shape: tuple[int, ...], sizes: _Sizes) -> bool:
        return shape == (sizes.into, sizes.out // PER_WORD)

    def read(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> Affine:
        stem = weight.removesuffix("weight")
        return Affine(
            codes=_in_columns(checkpoint.load(f"{stem}qweight")).T,
            zeros=_in_columns(checkpoint.load(f"{stem}qzeros")),
            scales=checkpoint.load(f"{stem}scales"),
            groups=_in_order(self._sizes(checkpoint, stem)),
            dtype=dtype,
        )


def _in_order(sizes: _Sizes) -> Tensor:
    """Return the group of each input where groups are consecutive."""
    return torch.arange(sizes.into) // (sizes.into // sizes.groups)


def _in_columns(words: Integer[Tensor, "rows words"]) -> Integer[Tensor, "rows columns"]:
    """Return the integers in words of AWQ, in the order of their columns."""
    rows = unpack_words(words)
    return rows.view(len(rows), -1, PER_WORD)[:, :, _AWQ_PLACES].flatten(1)


READ_ONLY: tuple[StoredFormat, ...] = (GptqFormat(), AwqFormat())
"""Formats that are dequantised on reading, and never written."""
