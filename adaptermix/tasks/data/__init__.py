"""Data files: which they are, which language, and their rows."""

from .classify import ClassifyRow, read_classify
from .files import DataFile, find_files, parse_rows
from .ner import NerRow, read_ner
from .nli import NliRow, read_nli
from .pairs import Pair, read_pairs
from .parallel import ParallelText, read_parallel
from .qa import QaRow, read_qa
from .sft import SftRow, read_sft
from .slots import SlotRow, read_slots
from .translate import TranslateRow, read_translations

__all__ = [
    "ClassifyRow",
    "DataFile",
    "NerRow",
    "NliRow",
    "Pair",
    "ParallelText",
    "QaRow",
    "SftRow",
    "SlotRow",
    "TranslateRow",
    "find_files",
    "parse_rows",
    "read_classify",
    "read_ner",
    "read_nli",
    "read_pairs",
    "read_parallel",
    "read_qa",
    "read_sft",
    "read_slots",
    "read_translations",
]
