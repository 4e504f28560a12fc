"""Hashes of the texts of data rows, to recognise rows in other files, formats and spellings."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..io.files import ROWS_FILE, write_whole

Hashes = NDArray[np.uint64]

SHORT_BYTES, LONG_LETTERS = 8, 24
"""Limits after `normalised`: a row of fewer bytes (`yes`) is short, one with enough letters is long."""


class Share(NamedTuple):
    """Largest expected share of rows that two files have in common by coincidence: of all rows, and of long rows."""

    rows: float
    long: float


OF_FILE, COVERED = Share(1 / 5, 1 / 10), Share(1 / 3, 1 / 6)
"""Limits: for the share of a file's rows that are in another file, and for the share of the other file's rows in it.

Published splits share rows because short requests repeat. xSID has the most: 29 % of its English test rows are training
rows ("set an alarm for 7 am"), and 13 % of those with at least 24 letters. 12 to 14 % of its validation rows, and 2 to
9 % of the long ones, are test rows (27 % in Japanese).
"""
_DEVIATIONS = 1.645
"""One-sided 5 % quantile of the normal distribution, for counts that arise by coincidence."""
_SHORT, _MEDIUM, _LONG = range(3)
_CLASS = np.uint64(3)
"""The two lowest bits of a hash contain the length class."""
_FEW = 2**16
_BEYOND = re.compile(rf"[{chr(_FEW)}-{chr(sys.maxunicode)}]")
_KINDS = ("whole", "sides", "parts")


@cache
def _dropped() -> re.Pattern[str]:
    """Return a pattern of punctuation (P), blanks (Z) and controls (C) among the first 65,536 characters.

    A pattern that includes the higher characters is 100 times slower.
    """
    kinds = "".join(kind[0] for kind in map(unicodedata.category, map(chr, range(_FEW))))
    spans = (match.span() for match in re.finditer("[PZC]+", kinds))
    return re.compile("[" + "".join(rf"\U{start:08x}-\U{stop - 1:08x}" for start, stop in spans) + "]+")


def normalised(text: str) -> str:
    """Return a text without case, width, punctuation and blanks, to compare rows.

    Example:
        >>> normalised("Hello,  World!") == normalised("hello world")
        True
    """
    folded = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
    if _BEYOND.search(folded):
        return "".join(mark for mark in folded if unicodedata.category(mark)[0] not in "PZC") or text
    return _dropped().sub("", folded) or text


@dataclass(frozen=True, slots=True)
class RowTexts:
    """The texts of a row: the model's inputs, and answers that are texts.

    Args:
        texts: The texts that identify the row together.
        separate: Whether each text is a sentence that identifies a row alone, as the sides of a translation pair do.
            Otherwise one shared text does not make two rows equal: many questions share a context.
        further: Texts that do not identify the row, such as an answer.
    """

    texts: tuple[str, ...]
    separate: bool = False
    further: tuple[str, ...] = ()


def _hash(*normal: str) -> int:
    """Return an 8-byte hash of normalised texts, independent of their order."""
    whole = "\0".join(sorted(normal)).encode("utf-8", "surrogatepass")
    letters = sum(map(len, normal))
    kind = _LONG if letters >= LONG_LETTERS else _SHORT if len(whole) < SHORT_BYTES else _MEDIUM
    digest = hashlib.blake2b(whole, digest_size=8).digest()
    return int.from_bytes(digest, "little") & ~int(_CLASS) | kind


def _sorted(values: Iterable[int] | Hashes) -> Hashes:
    array = values if isinstance(values, np.ndarray) else np.fromiter(values, dtype=np.uint64)
    return np.unique(array)


def _among(values: Hashes, *known: Hashes) -> NDArray[np.bool_]:
    return np.isin(values, np.concatenate(known)) if len(values) else np.zeros(0, dtype=bool)


@dataclass(frozen=True, eq=False)
class RowHashes:
    """A set of rows, as hashes.

    Args:
        whole: One hash per row, of all its texts.
        sides: Texts of multi-text rows that identify a row alone.
        parts: Texts of other multi-text rows, and further texts.
    """

    whole: Hashes
    sides: Hashes
    parts: Hashes

    @classmethod
    def of(cls, rows: Iterable[RowTexts]) -> RowHashes:
        """Return the set of the rows."""
        return ListedRows.of(rows).hashes

    @classmethod
    def union(cls, sets: Sequence[RowHashes]) -> RowHashes:
        """Return the union of one or more sets."""
        return cls(*(_sorted(np.concatenate([getattr(one, kind) for one in sets])) for kind in _KINDS))

    @cached_property
    def key(self) -> str:
        """The name of the set: a hash of its hashes."""
        digest = hashlib.blake2b(digest_size=8)
        for kind in _KINDS:
            values: Hashes = getattr(self, kind)
            digest.update(f"{len(values)}:".encode() + values.astype("<u8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Rows of a file that are in another set of rows.

    Args:
        same: Number of the file's rows that are in the set.
        total: Number of the file's rows.
        matters: Whether the share is larger than coincidence explains; see `OF_FILE`.
    """

    same: int
    total: int
    matters: bool


@dataclass(frozen=True, eq=False)
class ListedRows:
    """The rows of a file in order, as hashes.

    Args:
        whole: One hash per row, of all its texts. Shape: [n].
        pieces: Each text of multi-text rows, and further texts. Shape: [k].
        row_of: The row of each piece. Shape: [k].
        is_side: Whether a piece identifies a row alone. Shape: [k].
    """

    whole: Hashes
    pieces: Hashes
    row_of: NDArray[np.int64]
    is_side: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Iterable[RowTexts]) -> ListedRows:
        """Hash rows."""
        # Texts repeat within a file, such as contexts of questions and premises.
        normal_of = lru_cache(maxsize=4096)(lambda text: normalised(text.strip()))
        whole: list[int] = []
        pieces: list[tuple[int, int, bool]] = []
        for row in rows:
            normal = [normal_of(text) for text in row.texts]
            several = [(text, row.separate) for text in normal] if len(normal) > 1 else []
            for text, is_side in (*several, *((normal_of(text), False) for text in row.further)):
                if text:
                    pieces.append((_hash(text), len(whole), is_side))
            whole.append(_hash(*normal))
        columns = tuple(zip(*pieces, strict=True)) or ((), (), ())
        return cls(
            whole=np.array(whole, dtype=np.uint64),
            pieces=np.array(columns[0], dtype=np.uint64),
            row_of=np.array(columns[1], dtype=np.int64),
            is_side=np.array(columns[2], dtype=bool),
        )

    @classmethod
    def joined(cls, several: Sequence[ListedRows]) -> ListedRows:
        """Concatenate the rows of one or more files."""
        starts = np.cumsum([0, *(len(one.whole) for one in several[:-1])])
        return cls(
            whole=np.concatenate([one.whole for one in several]),
            pieces=np.concatenate([one.pieces for one in several]),
            row_of=np.concatenate([one.row_of + start for one, start in zip(several, starts, strict=True)]),
            is_side=np.concatenate([one.is_side for one in several]),
        )

    @cached_property
    def hashes(self) -> RowHashes:
        """The set of these rows."""
        sides, parts = self.pieces[self.is_side], self.pieces[~self.is_side]
        return RowHashes(_sorted(self.whole), _sorted(sides), _sorted(parts))

    def overlap(self, known: Sequence[RowHashes]) -> Overlap:
        """Return how many of these rows are in some sets of rows.

        A row counts if its texts, in any order, are those of a row in a set. It also counts if it is a single text that
        is a side or a part in a set, or if one of its texts is a row or a side in a set.

        Args:
            known: The sets.
        """
        if not known or not len(self.whole):
            return Overlap(same=0, total=len(self.whole), matters=False)
        every = RowHashes.union(known)
        exact = _among(self.whole, every.whole)
        same = exact | _among(self.whole, every.sides, every.parts)
        pieces_known = _among(self.pieces, every.whole, every.sides) | (
            self.is_side & _among(self.pieces, every.parts) if len(self.pieces) else self.is_side
        )
        same[self.row_of[pieces_known]] = True
        matters = _is_much(self.whole[same], self.whole, self.whole[exact], OF_FILE)
        return Overlap(
            same=int(same.sum()),
            total=len(self.whole),
            matters=matters or any(self._covers(other) for other in known),
        )

    def _covers(self, other: RowHashes) -> bool:
        """Return whether these rows contain a large share of another set."""
        hashes = self.hashes
        exact = other.whole[_among(other.whole, hashes.whole)]
        single = other.whole[_among(other.whole, hashes.sides, hashes.parts)]
        sides = other.sides[_among(other.sides, hashes.whole, hashes.sides, hashes.parts)]
        parts = other.parts[_among(other.parts, hashes.whole, hashes.sides)]
        several = max(len(sides), len(parts)) if len(other.whole) else 0
        return (
            _is_much(np.union1d(exact, single), other.whole, exact, COVERED)
            # Pieces are counted instead of their rows, since their rows' lengths are not known.
            or 0 < len(other.whole) <= several
            or _is_more(several, len(other.whole), COVERED.rows)
        )


def _is_much(same: Hashes, rows: Hashes, exact: Hashes, share: Share) -> bool:
    """Return whether rows overlap more than by coincidence. Equal rows count once; short rows only if all are short.

    Args:
        same: The shared rows.
        rows: All rows.
        exact: Those of `same` that share all their texts.
        share: The expected share by coincidence.
    """
    same, rows, exact = (_sorted(values) for values in (same, rows, exact))
    if np.any(rows & _CLASS != _SHORT):
        same, rows = (values[values & _CLASS != _SHORT] for values in (same, rows))
    long, all_long = (values[values & _CLASS == _LONG] for values in (exact, rows))
    is_all = 0 < len(same) == len(rows)
    return is_all or _is_more(len(same), len(rows), share.rows) or _is_more(len(long), len(all_long), share.long)


def _is_more(count: int, of: int, share: float) -> bool:
    """Return whether a count exceeds a share by more than coincidence (normal approximation of the binomial)."""
    return count > share * of + _DEVIATIONS * math.sqrt(share * (1 - share) * of) + 0.5


_REMEMBERED: dict[str, RowHashes] = {}
"""Sets of rows that this process hashed or read, by name; a manifest only contains the names."""


def remember(hashes: RowHashes) -> str:
    """Cache a set of rows for `write_sets`, and return its name."""
    _REMEMBERED.setdefault(hashes.key, hashes)
    return hashes.key


def remembered(key: object) -> RowHashes | None:
    """Return a cached set of rows by its name, or None."""
    return _REMEMBERED.get(key) if isinstance(key, str) else None


def pack(sets: Mapping[str, RowHashes]) -> bytes:
    """Serialise sets of rows: a line of JSON with names and counts, then 8 bytes per hash."""
    counts = {key: [len(getattr(sets[key], kind)) for kind in _KINDS] for key in sorted(sets)}
    head = json.dumps({"version": 1, "sets": counts}, separators=(",", ":")).encode() + b"\n"
    return head + b"".join(getattr(sets[key], kind).astype("<u8").tobytes() for key in counts for kind in _KINDS)


def unpack(content: bytes) -> dict[str, RowHashes]:
    """Parse sets of rows.

    Raises:
        ValueError: the bytes are damaged, or of another version.
    """
    head, _, body = content.partition(b"\n")
    try:
        document = json.loads(head)
        counts = {str(key): [int(count) for count in lengths] for key, lengths in document["sets"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("the file must start with a line of JSON that names its sets of rows") from error
    if document.get("version") != 1 or any(
        len(lengths) != len(_KINDS) or min(lengths) < 0 for lengths in counts.values()
    ):
        raise ValueError("the file must be of version 1, with three counts for each set of rows")
    if len(body) != 8 * sum(map(sum, counts.values())):
        raise ValueError("the file must contain all hashes that it names, and is truncated")
    values, at, sets = np.frombuffer(body, dtype="<u8").astype(np.uint64), 0, {}
    for key, lengths in counts.items():
        ends = np.cumsum([at, *lengths])
        sets[key] = RowHashes(*(values[start:stop] for start, stop in pairwise(ends)))
        at = int(ends[-1])
        if sets[key].key != key:
            raise ValueError("the file must contain the hashes that it names, and was changed")
    return sets


def write_sets(folder: Path, keys: Iterable[object]) -> None:
    """Write the named sets of rows into a folder; write no file for an empty list.

    Args:
        folder: The folder.
        keys: Names; those that are not cached are left out.
    """
    sets = {hashes.key: hashes for key in keys if (hashes := remembered(key)) is not None}
    if sets:
        write_whole(folder / ROWS_FILE, pack(sets))


def read_sets(path: Path) -> dict[str, RowHashes]:
    """Read the sets of rows of a file, and cache them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    status = path.stat()
    sets = _read_sets(path.absolute(), (status.st_ino, status.st_size, status.st_mtime_ns))
    _REMEMBERED.update(sets)
    return sets


@lru_cache(maxsize=256)
def _read_sets(path: Path, _status: tuple[int, int, int]) -> dict[str, RowHashes]:
    return unpack(path.read_bytes())
