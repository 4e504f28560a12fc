"""Weights in 4 bits as bitsandbytes has them: codes of a table of 16 values, and a scale per block of 64."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ..quantization import BLOCK, unpack


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FourBit:
    """A weight in 4 bits.

    Args:
        codes: Place of each weight in the table, 0 to 15.
        scales: Scale of each block of 64 weights, row after row, as it is read back.
        state: What bitsandbytes must know to read it; of the scales it holds what is stored.

    Shapes: `codes` [out in], `scales` [blocks], float32.

    Reference: Dettmers et al., QLoRA, NeurIPS 2023, arXiv 2305.14314, section 3.
    """

    codes: Integer[Tensor, "out in"]
    scales: Float[Tensor, " blocks"]
    state: Any

    @property
    def table(self) -> Float[Tensor, " 16"]:
        """Return the values of the codes, of which the largest is 1."""
        table: Tensor = self.state.code.float()
        return table

    def scale_of_each(self) -> Float[Tensor, "out in"]:
        """Return the scale of each weight."""
        return self.scales.repeat_interleave(BLOCK)[: self.codes.numel()].view(self.codes.shape)

    def weight(self) -> Float[Tensor, "out in"]:
        """Return what the codes and scales stand for, in float32."""
        return self.table[self.codes.long()] * self.scale_of_each()


def quantize(weight: Tensor, *, kind: str, double: bool = True) -> FourBit:
    """Round a weight to the nearest codes under the largest value of each block, as bitsandbytes does.

    Args:
        weight: What to round, of any float dtype.
        kind: `nf4` or `fp4`.
        double: Whether scales are quantised too, in 8 bits.

    Shapes: `weight` [out in].
    """
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.float().contiguous(), blocksize=BLOCK, quant_type=kind, compress_statistics=double
    )
    return FourBit(codes=unpack(packed, weight.numel()).view(weight.shape), scales=read_scales(state), state=state)


def read_scales(state: Any) -> Float[Tensor, " blocks"]:
    """Return the scales of a state of bitsandbytes, as a forward pass reads them."""
    if not state.nested:
        plain: Tensor = state.absmax.float()
        return plain
    from bitsandbytes import functional

    found: Tensor = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return found.float()


def pack(codes: Tensor) -> Integer[Tensor, "bytes 1"]:
    """Return two codes per byte, as `unpack` reads them."""
    flat = codes.flatten().to(torch.uint8)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return ((flat[0::2] << 4) | flat[1::2]).unsqueeze(1)


def with_codes(weight: FourBit, codes: Tensor) -> FourBit:
    """Return a weight of the same scales and other codes."""
    return replace(weight, codes=codes.to(torch.uint8))


def with_scales(weight: FourBit, scales: Tensor) -> FourBit:
    """Return a weight of the same codes and the storable scales that are nearest to these.

    Scales that are quantised themselves keep their own scale and offset, so they stay within the range that the weight
    has had.

    Shapes: `scales` [blocks].
    """
    state = copy(weight.state)
    if not state.nested:
        state.absmax = scales.to(weight.state.absmax.dtype)
        return replace(weight, scales=read_scales(state), state=state)
    each = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
    values = state.state2.code.float()
    middles = (values[1:] + values[:-1]) / 2
    wanted = (scales - state.offset) / each.clamp(min=torch.finfo(torch.float32).tiny)
    state.absmax = torch.bucketize(wanted, middles).to(torch.uint8)
    return replace(weight, scales=read_scales(state), state=state)


def stored(name: str, weight: FourBit) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that transformers and bitsandbytes read a weight from.

    Args:
        name: Name of the weight, such as `model.layers.0.self_attn.q_proj.weight`.
        weight: What to store.
    """
    parts = weight.state.as_dict(packed=True)
    return {name: pack(weight.codes)} | {f"{name}.{part}": tensor for part, tensor in parts.items()}
