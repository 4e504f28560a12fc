"""The 4- and 8-bit formats of bitsandbytes: codes that index a table of values, and a scale per block of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ..errors import ModelError
from ..models.quantization import BLOCK, unpack

_LEVELS = 127
"""Steps from 0 to the scale in 8 bits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized(ABC):
    """A weight whose values are codes times scales.

    Args:
        codes: Index of each weight's value in the table.
        scales: Scale of each block of weights, row after row, as dequantised.

    Shapes: `codes` [out in], uint8; `scales` [blocks], float32.
    """

    codes: Integer[Tensor, "out in"]
    scales: Float[Tensor, " blocks"]

    @property
    @abstractmethod
    def table(self) -> Float[Tensor, " levels"]:
        """The values of the codes."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Number of weights that share a scale."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the weight in a forward pass."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the manifest entry of the format."""

    @abstractmethod
    def with_scales(self, scales: Tensor) -> Self:
        """Return a weight of the same codes and the storable scales that are nearest to these."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Return the weight on a device."""

    @abstractmethod
    def requantized(self, weight: Tensor) -> Self:
        """Return another weight, rounded in the same format."""

    @abstractmethod
    def stored(self, name: str) -> dict[str, Tensor]:
        """Return the tensors from which transformers and bitsandbytes load the weight.

        Args:
            name: Name of the weight, such as `model.layers.0.self_attn.q_proj.weight`.
        """

    def with_codes(self, codes: Tensor) -> Self:
        """Return a weight of the same scales and other codes."""
        return replace(self, codes=codes.to(torch.uint8))

    def scale_of_each(self) -> Float[Tensor, "out in"]:
        """Return the scale of each weight."""
        return self.scales.repeat_interleave(self.block)[: self.codes.numel()].view(self.codes.shape)

    def weight(self) -> Float[Tensor, "out in"]:
        """Return the dequantised weight in float32."""
        return self.table[self.codes.long()] * self.scale_of_each()


@dataclass(frozen=True, kw_only=True, eq=False)
class FourBit(Quantized):
    """A weight in NF4 or FP4.

    Args:
        codes: Index of each weight's value in the table, 0 to 15.
        scales: As in `Quantized`.
        state: The `QuantState` of bitsandbytes; it has the scales in their stored form.

    Reference: Dettmers et al., QLoRA, NeurIPS 2023, arXiv 2305.14314, section 3.
    """

    state: Any

    @classmethod
    def of(cls, weight: Tensor, *, kind: str, double: bool = True, block: int = BLOCK) -> FourBit:
        """Round a weight to the nearest codes under the largest value of each block, as bitsandbytes does.

        Args:
            weight: The weight, of any float dtype.
            kind: `nf4` or `fp4`.
            double: Whether scales are quantised too, in 8 bits.
            block: Number of weights that share a scale.
        """
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            weight.float().contiguous(), blocksize=block, quant_type=kind, compress_statistics=double
        )
        state.dtype = weight.dtype
        return cls(codes=unpack(packed, weight.numel()).view(weight.shape), scales=_read_scales(state), state=state)

    @classmethod
    def read(cls, packed: Tensor, parts: Mapping[str, Tensor]) -> FourBit:
        """Read a weight from the tensors of a checkpoint.

        Args:
            packed: Two codes per byte.
            parts: The other tensors, by the suffix that follows the weight's name.
        """
        from bitsandbytes.functional import QuantState

        state = QuantState.from_dict(dict(parts), device=packed.device)
        codes = unpack(packed.flatten().view(torch.uint8), state.shape.numel()).view(state.shape)
        return cls(codes=codes, scales=_read_scales(state), state=state)

    @property
    def table(self) -> Float[Tensor, " 16"]:
        """The values of the codes; the largest is 1."""
        table: Tensor = self.state.code.float()
        return table

    @property
    def block(self) -> int:
        """Number of weights that share a scale."""
        return int(self.state.blocksize)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight in a forward pass."""
        dtype: torch.dtype = self.state.dtype
        return dtype

    def identity(self) -> dict[str, Any]:
        """Return the manifest entry of the format."""
        return {"format": self.state.quant_type, "block_size": self.block, "double": bool(self.state.nested)}

    def with_scales(self, scales: Tensor) -> FourBit:
        """Return a weight of the same codes and the storable scales that are nearest to these.

        Quantised scales keep their own scale and offset, so they stay within the original range.
        """
        state = copy(self.state)
        if not state.nested:
            state.absmax = scales.to(self.state.absmax.dtype)
            return replace(self, scales=_read_scales(state), state=state)
        each = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        values = state.state2.code.float()
        middles = (values[1:] + values[:-1]) / 2
        ratios = (scales - state.offset) / each.clamp(min=torch.finfo(torch.float32).tiny)
        state.absmax = torch.bucketize(ratios, middles).to(torch.uint8)
        return replace(self, scales=_read_scales(state), state=state)

    def to(self, device: torch.device) -> FourBit:
        """Return the weight on a device."""
        state = copy(self.state)
        state.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), state=state)

    def requantized(self, weight: Tensor) -> FourBit:
        """Return another weight, rounded in the same format."""
        state = self.state
        result = self.of(weight, kind=state.quant_type, double=state.nested, block=state.blocksize)
        result.state.dtype = state.dtype
        return result

    def stored(self, name: str) -> dict[str, Tensor]:
        """Return the tensors from which transformers and bitsandbytes load the weight."""
        parts = self.state.as_dict(packed=True)
        return {name: pack(self.codes)} | {f"{name}.{part}": tensor for part, tensor in parts.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class EightBit(Quantized):
    """A weight in LLM.int8(): a scale per row, and 255 values from its negative to it.

    Args:
        codes: Steps above the least, 0 to 254.
        scales: Largest magnitude of each row.
        form: Dtype of the weight in a forward pass.

    Reference: Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv 2208.07339, section 2.
    """

    form: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> EightBit:
        """Round a weight like bitsandbytes, which first casts it to float16."""
        from bitsandbytes import functional

        steps, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return cls.of_steps(steps, scales, weight.dtype)

    @classmethod
    def of_steps(cls, steps: Tensor, scales: Tensor, dtype: torch.dtype) -> EightBit:
        """Return a weight of these steps, -127 to 127, and scales.

        Args:
            steps: As bitsandbytes stores them, [out in].
            scales: Largest magnitude of each row.
            dtype: Dtype of the weight in a forward pass.

        Raises:
            ModelError: there is a step of -128, which bitsandbytes never writes.
        """
        if steps.numel() and int(steps.min()) < -_LEVELS:
            raise ModelError(
                "weights in 8 bits must be steps from -127 to 127, and one is -128. Quantise them again.",
                code="quantized.minus-128",
            )
        codes = (steps.to(torch.int16) + _LEVELS).to(torch.uint8)
        return cls(codes=codes, scales=scales.float().flatten(), form=dtype)

    @property
    def table(self) -> Float[Tensor, " 255"]:
        """The values of the codes, from -1 to 1."""
        return torch.arange(-_LEVELS, _LEVELS + 1, device=self.codes.device) / _LEVELS

    @property
    def block(self) -> int:
        """Number of weights that share a scale: those of a row."""
        return self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight in a forward pass."""
        return self.form

    def identity(self) -> dict[str, Any]:
        """Return the manifest entry of the format."""
        return {"format": "int8"}

    def with_scales(self, scales: Tensor) -> EightBit:
        """Return a weight of the same codes and these scales."""
        return replace(self, scales=scales.float())

    def to(self, device: torch.device) -> EightBit:
        """Return the weight on a device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def requantized(self, weight: Tensor) -> EightBit:
        """Return another weight, rounded in the same format."""
        return replace(self.of(weight), form=self.form)

    def stored(self, name: str) -> dict[str, Tensor]:
        """Return the tensors from which transformers and bitsandbytes load the weight."""
        stem = name.removesuffix("weight")
        steps = (self.codes.to(torch.int16) - _LEVELS).to(torch.int8)
        # 0 means row-major, the only layout that bitsandbytes still supports
        return {name: steps, f"{stem}SCB": self.scales, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}


FORMATS: Mapping[str, Callable[[Tensor], Quantized]] = {
    "nf4": partial(FourBit.of, kind="nf4"),
    "fp4": partial(FourBit.of, kind="fp4"),
    "int8": EightBit.of,
}
"""Functions that round a weight, by the name of the format. In 4 bits the scales are quantised too, as in QLoRA."""


def _read_scales(state: Any) -> Float[Tensor, " blocks"]:
    """Return the scales of a state of bitsandbytes, as a forward pass reads them."""
    if not state.nested:
        plain: Tensor = state.absmax.float()
        return plain
    from bitsandbytes import functional

    scales: Tensor = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()


def pack(codes: Tensor) -> Integer[Tensor, "bytes 1"]:
    """Return two codes per byte, as `unpack` reads them."""
    flat = codes.flatten().to(torch.uint8)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return ((flat[0::2] << 4) | flat[1::2]).unsqueeze(1)
