"""The 4- and 8-bit formats of bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ...errors import ModelError
from ...io.checkpoint_files import Checkpoint, TensorHeader
from ...io.json_types import JsonObject
from ...io.safetensors_writer import DTYPE_NAMES
from .base import FORMATS, Format, Quantized

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import BitsAndBytesConfig

BLOCK = 64
"""Weights per scale in 4-bit formats; bitsandbytes' default."""
_LEVELS = 127
"""Steps from 0 to the scale in 8 bits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FourBit(Quantized):
    """A weight in NF4 or FP4.

    Args:
        codes: Index of each weight's value in the table, 0 to 15.
        scales: As in `Quantized`.
        state: The `QuantState` of bitsandbytes; it has the scales in their stored form.

    Reference: Dettmers et al., QLoRA, NeurIPS 2023, arXiv 2305.14314, section 3.
    """

    state: QuantState

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

    def identity(self) -> JsonObject:
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
        state.to(device)  # type: ignore[no-untyped-call]
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

    def identity(self) -> JsonObject:
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


_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {str(dtype).removeprefix("torch."): name for dtype, name in DTYPE_NAMES.items()}


class FourBitFormat(Format):
    """NF4 or FP4 of bitsandbytes. The scales are quantised too, as in QLoRA."""

    package = "bitsandbytes"

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity = {"format": name, "block_size": BLOCK, "double": True}

    def __call__(self, weight: Tensor) -> FourBit:
        return FourBit.of(weight, kind=self.name)

    def config(self, dtype: torch.dtype | str, skipped: Sequence[str] | None) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            **_skipping(skipped),
        )

    def is_config(self, stored: Mapping[str, object]) -> bool:
        is_own = stored.get("quant_method") == self.package and not stored.get("load_in_8bit")
        return is_own and stored.get("bnb_4bit_quant_type", "fp4") == self.name

    def weight_of(self, tensor: str) -> str | None:
        weight, _, kind = tensor.partition(_STATE)
        return weight if kind == self.name else None

    def parts(self, weight: str, tensors: Iterable[str]) -> set[str]:
        return {name for name in tensors if name.startswith(f"{weight}.")}

    def header(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> TensorHeader:  # noqa: ARG002
        shape, dtype_name = _state(checkpoint, f"{weight}{_STATE}{self.name}")
        return replace(checkpoint.tensors[weight], shape=shape, dtype=_DTYPES[dtype_name])

    def read(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> FourBit:  # noqa: ARG002
        parts = self.parts(weight, checkpoint.tensors)
        return FourBit.read(
            checkpoint.load(weight), {name.removeprefix(f"{weight}."): checkpoint.load(name) for name in parts}
        )


class EightBitFormat(Format):
    """LLM.int8() of bitsandbytes."""

    name = "int8"
    package = "bitsandbytes"

    def __init__(self) -> None:
        self.identity = {"format": self.name}

    def __call__(self, weight: Tensor) -> EightBit:
        return EightBit.of(weight)

    def config(self, dtype: torch.dtype | str, skipped: Sequence[str] | None) -> BitsAndBytesConfig:  # noqa: ARG002
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, **_skipping(skipped))

    def is_config(self, stored: Mapping[str, object]) -> bool:
        return stored.get("quant_method") == self.package and bool(stored.get("load_in_8bit"))

    def weight_of(self, tensor: str) -> str | None:
        return f"{tensor.removesuffix('SCB')}weight" if tensor.endswith(".SCB") else None

    def parts(self, weight: str, tensors: Iterable[str]) -> set[str]:  # noqa: ARG002
        stem = weight.removesuffix("weight")
        return {f"{stem}SCB", f"{stem}weight_format"}

    def header(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> TensorHeader:
        return replace(checkpoint.tensors[weight], dtype=DTYPE_NAMES[dtype])

    def read(self, checkpoint: Checkpoint, weight: str, dtype: torch.dtype) -> EightBit:
        scales = f"{weight.removesuffix('weight')}SCB"
        return EightBit.of_steps(checkpoint.load(weight), checkpoint.load(scales), dtype)


def _skipping(skipped: Sequence[str] | None) -> dict[str, list[str]]:
    # The option is named after the first format of bitsandbytes and applies to all of them.
    return {} if skipped is None else {"llm_int8_skip_modules": list(skipped)}


def _state(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of a matrix from the state that bitsandbytes stores with it."""
    try:
        state = json.loads(bytes(checkpoint.load(name).tolist()))
        if state["dtype"] in _DTYPES and len(state["shape"]) == 2:
            return tuple(state["shape"]), state["dtype"]
    except (ValueError, KeyError, TypeError):
        pass
    raise ModelError(
        f"{checkpoint.path}: '{name}' must hold bitsandbytes' state of a matrix, and does not.", code="quantized.state"
    )


def _read_scales(state: QuantState) -> Float[Tensor, " blocks"]:
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


def unpack(packed: Tensor, count: int) -> Tensor:
    """Return one 4-bit code per weight; the first of two is in the high half of a byte."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:count]


FORMATS.update(nf4=FourBitFormat("nf4"), fp4=FourBitFormat("fp4"), int8=EightBitFormat())
