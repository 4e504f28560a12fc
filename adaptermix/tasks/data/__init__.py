"""Data files: which they are, which language, and their rows."""

from . import presets  # noqa: F401  (registers the prefixes hf: and preset:)
from .files import DataFile, find_files, parse_rows
from .pairs import Pair, read_pairs
from .parallel import ParallelText, read_parallel

__all__ = ["DataFile", "Pair", "ParallelText", "find_files", "parse_rows", "read_pairs", "read_parallel"]
