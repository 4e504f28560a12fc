"""Random numbers that depend only on their purpose.

A draw is a pure function of (seed, adapter, module, position), so neither the order of the modules nor the number of
threads, the size of the blocks or the device changes it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK16, _MASK19 = 0xFFFF, 0x7FFFF


def _signed(value: int) -> int:
    """Return the 32-bit pattern of a whole number as a signed one, as torch multiplies it."""
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby, 2011, public domain), in place; products wrap around."""
    x ^= (x >> 16) & _MASK16
    x *= _signed(0x85EBCA6B)
    x ^= (x >> 13) & _MASK19
    x *= _signed(0xC2B2AE35)
    x ^= (x >> 16) & _MASK16
    return x


def uniform(
    seed: int, adapter: str, module: str, *, first: int, shape: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Return numbers in [0, 1), a multiple of 2^-24 each, for the positions `first`, `first + 1`, ... of one matrix.

    Two rounds of a 32-bit mixing function over the position, each under its own 32 bits of a SHA-256 of the key.

    Args:
        seed: Seed of the merge.
        adapter: Whose update it is for.
        module: Path of the module.
        first: Position, in row order, of the first number.
        shape: Shape of the result; filled in row order.
        device: Where to compute.

    Shapes: `shape`, float32.
    """
    digest = hashlib.sha256(f"{seed}\0{adapter}\0{module}".encode()).digest()
    keys = [_signed(int.from_bytes(digest[i : i + 4], "little")) for i in (0, 4)]
    count = int(torch.Size(shape).numel())
    x = torch.arange(count, dtype=torch.int32, device=device)
    x += _signed(first)
    x *= _signed(0x9E3779B9)
    for key in keys:
        x ^= key
        _mix(x)
    return ((x >> 8) & 0xFFFFFF).float().mul_(2.0**-24).reshape(shape)
