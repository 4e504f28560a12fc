"""Quantised formats of base models."""

from .base import FORMATS, Format, Quantized, known_formats
from .bitsandbytes import BLOCK, EightBit, FourBit, pack, unpack

__all__ = ["BLOCK", "FORMATS", "EightBit", "Format", "FourBit", "Quantized", "known_formats", "pack", "unpack"]
