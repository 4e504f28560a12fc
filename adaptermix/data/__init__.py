"""Data files: which they are, which language, and their rows."""

from .pairs import Pair, read_pairs
from .parallel import ParallelText, read_parallel
from .slots import SlotRow, read_slots
from .source import DataFile, find_files, parse_rows

__all__ = [
    "DataFile",
    "Pair",
    "ParallelText",
    "SlotRow",
    "find_files",
    "parse_rows",
    "read_pairs",
    "read_parallel",
    "read_slots",
]
