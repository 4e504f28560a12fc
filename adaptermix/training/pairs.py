"""Parallel pairs of a training run: read, checked, counted, encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import DataError
from ..models.base import BaseModel
from ..options import AlignSettings, JointSettings
from ..progress import Watcher
from ..tasks.data import Pair, read_pairs
from ..tasks.data.files import DataFile
from ..tasks.data.report import RowsReport, describe
from ..tasks.heads.base import cut_languages, cut_warning
from ..tasks.splits import DEV, TRAINING, refuse_tested
from .runner import DataEntries, FileEntries
from .trainer import BatchLoss


def encode_side(base: BaseModel, pairs: Sequence[Pair], side: str, most: int, watch: Watcher) -> list[list[int]]:
    """Return the token ids of one side of pairs, "source" or "target"."""
    texts = [getattr(pair, side) for pair in pairs]
    languages = [pair.languages[("source", "target").index(side)] for pair in pairs]
    encoded = base.encode(texts, languages, truncation=True, max_length=most)
    if cut := cut_languages(base, texts, languages, encoded, most):
        watch.note(cut_warning(cut, len(texts), most, "their ends", f"{side} sentences"))
    return [row["input_ids"] for row in encoded]


def describe_pairs(pairs: Sequence[Pair], files: Sequence[DataFile], held_out: Sequence[Pair] = ()) -> RowsReport:
    """Count pairs; a pair is repeated if both of its sides equal those of another pair."""

    def text(pair: Pair) -> str:
        return f"{pair.source}\n{pair.target}"

    rows = [("-".join(pair.languages), text(pair)) for pair in pairs]
    return describe(rows, list(map(text, held_out)), left_out=sum(file.left_out for file in files))


def require_pairs(pairs: Sequence[Pair], name: str = "pairs") -> None:
    """Refuse fewer than two different pairs.

    Args:
        pairs: The pairs.
        name: Their name in the message.

    Raises:
        DataError: there are fewer than two different ones.
    """
    if (count := len(set(pairs))) < 2:
        raise DataError(
            f"alignment needs at least two different {name}, since it compares them with each other; found {count}. "
            "Give more.",
            code="align.too-few-pairs",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairData:
    """Pairs of a run, read and checked.

    Args:
        pairs: Pairs to train on.
        dev: Dev pairs.
        files: Files of the pairs.
        dev_files: Files of the dev pairs.
        tested: The manifest's entries on files that were evaluated as test data.
        report: Counts of the pairs.
    """

    pairs: Sequence[Pair]
    dev: Sequence[Pair]
    files: Sequence[DataFile]
    dev_files: Sequence[DataFile]
    tested: FileEntries
    report: RowsReport

    @classmethod
    def read(cls, settings: AlignSettings | JointSettings, watch: Watcher) -> PairData:
        """Read the pairs.

        Raises:
            DataError: a file is invalid or was evaluated as test data, or there are fewer than two different pairs.
        """
        rows = settings.pair_rows if isinstance(settings, JointSettings) else settings.rows
        pairs, files = read_pairs(settings.pairs, rows=rows)
        require_pairs(pairs)
        dev, dev_files = read_pairs(settings.dev_pairs) if settings.dev_pairs else ([], [])
        if settings.dev_pairs:
            require_pairs(dev, "dev pairs")
        tested = refuse_tested({TRAINING: files, DEV: dev_files}, allowed=settings.allow_tested, watch=watch)
        report = describe_pairs(pairs, files, dev)
        return cls(pairs=pairs, dev=dev, files=files, dev_files=dev_files, tested=tested, report=report)

    def entries(self) -> DataEntries:
        """Return the manifest's entries on languages, files and rows."""
        return {
            "languages": {"aligned": sorted({language for pair in self.pairs for language in pair.languages})},
            "data": [file.entry() for file in self.files],
            "dev": [file.entry() for file in self.dev_files] or None,
            "tested": self.tested or None,
            "rows": self.report.document(),
        }


def pair_groups(pairs: Sequence[Pair], balance: str) -> list[list[int]]:
    """Return groups of pair numbers that are drawn equally often: one for each language pair, or one of all pairs."""
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
        work: Computes the loss.
        lengths: Tokens of each source sentence.
    """

    work: Callable[[Sequence[int]], BatchLoss]
    lengths: list[int]

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        return self.work(rows)

    @property
    def taught(self) -> Sequence[int]:
        return range(len(self.lengths))

    def terms(self, rows: Sequence[int]) -> int:
        return len(rows)
