"""Parallel pairs of a training run: read, checked, counted, encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..options import AlignSettings, JointSettings
from ..progress import Watcher
from ..tasks.data import Pair, read_pairs
from ..tasks.data.files import DataFile
from ..tasks.data.report import RowsReport, describe
from ..tasks.heads.base import told_cut
from .trainer import BatchLoss


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
    """Refuse fewer than two different pairs.

    Args:
        pairs: The pairs.
        name: What they are called.

    Raises:
        DataError: there are fewer than two different ones.
    """
    if (count := len(set(pairs))) < 2:
        raise DataError(
            f"alignment needs at least two different {name}, since it compares them with each other; found {count}. "
            "Give more."
        )


def read_dev_pairs(settings: AlignSettings | JointSettings) -> tuple[list[Pair], list[DataFile]]:
    """Read the pairs whose loss is looked at, none if none are given.

    Raises:
        DataError: a file is invalid, or has fewer than two different pairs.
    """
    if not settings.dev_pairs:
        return [], []
    pairs, files = read_pairs(settings.dev_pairs)
    require_pairs(pairs, "dev pairs")
    return pairs, files


def pair_groups(pairs: Sequence[Pair], balance: str) -> list[list[int]]:
    """Return the numbers of the pairs that are drawn equally often: of each two languages, or all."""
    if balance == "rows":
        return [list(range(len(pairs)))]
    groups: dict[tuple[str, str], list[int]] = {}
    for row, pair in enumerate(pairs):
        groups.setdefault(pair.languages, []).append(row)
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class PairsLoss:
    """Loss of pairs by their numbers.

    Args:
        work: Computes it.
        lengths: Tokens of each source sentence.
    """

    work: Callable[[Sequence[int]], BatchLoss]
    lengths: list[int]

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the loss of these pairs."""
        return self.work(rows)

    @property
    def taught(self) -> Sequence[int]:
        """Numbers of all pairs."""
        return range(len(self.lengths))

    def terms(self, rows: Sequence[int]) -> int:
        """Return how many pairs the loss is a mean over."""
        return len(rows)
