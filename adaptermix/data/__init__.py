"""Data files: which they are, which language, and their rows."""

from .classify import ClassifyRow, read_classify
from .ner import NerRow, read_ner
from .nli import NliRow, read_nli
from .pairs import Pair, read_pairs
from .parallel import ParallelText, read_parallel
from .slots import SlotRow, read_slots
from .source import DataFile, find_files, parse_rows

__all__ = [
    "ClassifyRow",
    "DataFile",
    "NerRow",
    "NliRow",
    "Pair",
    "ParallelText",
    "SlotRow",
    "find_files",
    "parse_rows",
    "read_classify",
    "read_ner",
    "read_nli",
    "read_pairs",
    "read_parallel",
    "read_slots",
]
