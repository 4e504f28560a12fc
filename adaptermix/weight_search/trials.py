"""What was tried and what it answered, as plain text that any storage can keep."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .space import Candidate

_MOST_BYTES = 2**28
"""Size of the answers of one trial that no search comes near; a few bytes can stand for more than a memory holds."""

Answers = Sequence[str | None]
"""One per dev row; None where a row was not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate and its answers on dev.

    Args:
        number: In the order in which trials began.
        candidate: What was merged.
        answers: One per dev row; None where the trial was stopped before it.
        seconds: What it took.
    """

    number: int
    candidate: Candidate
    answers: tuple[str | None, ...]
    seconds: float = 0.0

    def on_rows_of(self, other: Trial) -> Trial:
        """Return the trial as if it had been asked only the rows that another was."""
        pairs = zip(self.answers, other.answers, strict=True)
        return replace(self, answers=tuple(own if theirs is not None else None for own, theirs in pairs))

    @property
    def rows(self) -> int:
        """Return how many rows were asked."""
        return sum(answer is not None for answer in self.answers)

    @property
    def is_whole(self) -> bool:
        """Whether all rows were asked."""
        return None not in self.answers


def pack(answers: Answers) -> str:
    r"""Return answers as a short line of text.

    Example:
        >>> unpack(pack(["a", None, "ä\n"]))
        ['a', None, 'ä\n']
    """
    return base64.b85encode(zlib.compress(json.dumps(list(answers)).encode(), 9)).decode()


def unpack(text: object, rows: int | None = None) -> list[str | None]:
    """Return the answers that `pack` made a line of.

    Args:
        text: The line, from a storage that others can write to.
        rows: How many answers there must be, if that is known.

    Raises:
        ValueError: it is no such line, or has another number of answers, or is larger than any answers are.
    """
    if not isinstance(text, str):
        raise ValueError(f"answers must be text, found {type(text).__name__}")
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(base64.b85decode(text), _MOST_BYTES)
        found = json.loads(content) if unpacker.eof else None
    except (zlib.error, RecursionError) as error:
        raise ValueError(f"answers cannot be unpacked ({error})") from error
    if not isinstance(found, list) or not all(answer is None or isinstance(answer, str) for answer in found):
        raise ValueError(f"answers must be a list of texts of at most {_MOST_BYTES >> 20} MiB")
    if rows is not None and len(found) != rows:
        raise ValueError(f"there must be {rows} answers, found {len(found)}")
    return found
