"""Four-bit codes in 32-bit words, eight per word."""

from __future__ import annotations

import torch
from jaxtyping import Integer
from torch import Tensor

PER_WORD = 8
"""Codes in one word."""


def pack_words(codes: Integer[Tensor, "rows columns"]) -> Integer[Tensor, "rows words"]:
    """Return the codes of each row in int32 words; the first code is in the lowest bits, and the last word is padded.

    Args:
        codes: Codes from 0 to 15.
    """
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % PER_WORD))
    return (padded[:, 0::2] | (padded[:, 1::2] << 4)).contiguous().view(torch.int32)


def unpack_words(words: Integer[Tensor, "rows words"]) -> Integer[Tensor, "rows columns"]:
    """Return the codes of each row, eight per word, as uint8."""
    halves = words.contiguous().view(torch.uint8)
    return torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)
