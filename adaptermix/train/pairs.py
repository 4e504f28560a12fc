"""Parallel pairs of a training run: read, checked, counted, encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data import Pair, read_pairs
from ..data.report import RowsReport, describe
from ..data.source import DataFile
from ..errors import DataError
from ..heads.base import told_cut
from ..progress import Watcher
from ..settings import AlignSettings, JointSettings


def encode_side(tokenizer: Any, pairs: Sequence[Pair], side: str, most: int, watch: Watcher) -> list[list[int]]:
    """Return the token ids of one side of pairs, "source" or "target"."""
    texts = [getattr(pair, side) for pair in pairs]
    encoded: list[list[int]] = tokenizer(texts, truncation=True, max_length=most)["input_ids"]
    full = [row for row, ids in enumerate(encoded) if len(ids) == most]
    whole = tokenizer([texts[row] for row in full], verbose=False)["input_ids"] if full else []
    place = ("source", "target").index(side)
    cut = [pairs[row].languages[place] for row, ids in zip(full, whole, strict=True) if len(ids) > most]
    if cut:
        watch.note(told_cut(cut, len(texts), most, "their ends", f"{side} sentences"))
    return encoded


def describe_pairs(pairs: Sequence[Pair], files: Sequence[DataFile], held_out: Sequence[Pair] = ()) -> RowsReport:
    """Count pairs; one that is repeated has both sides of another."""

    def text(pair: Pair) -> str:
        return f"{pair.source}\n{pair.target}"

    rows = [("-".join(pair.languages), text(pair)) for pair in pairs]
    return describe(rows, list(map(text, held_out)), left_out=sum(file.left_out for file in files))


def require_pairs(pairs: Sequence[Pair], name: str = "pairs") -> None:
    """Refuse pairs that have no negatives.

    Args:
        pairs: The pairs.
        name: What they are called.

    Raises:
        DataError: there are fewer than two different ones.
    """
    if (count := len(set(pairs))) < 2:
        raise DataError(
            f"alignment needs at least two different {name}, since the others are the negatives; found {count}. "
            "Give more."
        )


def read_dev_pairs(settings: AlignSettings | JointSettings) -> tuple[list[Pair], list[DataFile]]:
    """Read the pairs whose loss is looked at, none if none are given.

    Raises:
        DataError: a file does not do, or the pairs have no negatives.
    """
    if not settings.dev_pairs:
        return [], []
    pairs, files = read_pairs(settings.dev_pairs)
    require_pairs(pairs, "dev pairs")
    return pairs, files
