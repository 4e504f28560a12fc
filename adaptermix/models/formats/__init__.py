"""Quantised formats of base models."""

from .base import FORMATS, Format, Quantized, known_formats
from .bitsandbytes import BLOCK, EightBit, FourBit, pack, unpack
from .compressed_tensors import Int4

__all__ = ["BLOCK", "FORMATS", "EightBit", "Format", "FourBit", "Int4", "Quantized", "known_formats", "pack", "unpack"]
