"""Trials and their answers, as plain text that any storage can keep."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .space import Candidate

_MOST_BYTES = 2**28
"""Largest unpacked size of the answers of a trial: a few bytes of a forged storage could expand to fill the memory."""

Answers = Sequence[str | None]
"""One per dev row; None where a row was not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate, its answers (one per dev row, None where it was stopped before), and the seconds they took."""

    number: int
    candidate: Candidate
    answers: tuple[str | None, ...] = ()
    seconds: float = 0.0

    def on_rows_of(self, other: Trial) -> Trial:
        """Return the trial with only those answers whose rows the other trial was asked too."""
        pairs = zip(self.answers, other.answers, strict=True)
        return replace(self, answers=tuple(answer if theirs is not None else None for answer, theirs in pairs))

    @property
    def rows(self) -> int:
        """The number of rows that were asked."""
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
    """Return the answers that `pack` encoded.

    Args:
        text: The line, from a storage that others can write to.
        rows: Number of answers that there must be, if it is known.

    Raises:
        ValueError: the text is not such a line, has another number of answers, or is larger than any answers are.
    """
    if not isinstance(text, str):
        raise ValueError(f"answers must be text, found {type(text).__name__}")
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(base64.b85decode(text), _MOST_BYTES)
        answers = json.loads(content) if unpacker.eof else None
    except (zlib.error, RecursionError) as error:
        raise ValueError(f"answers cannot be unpacked ({error})") from error
    if not isinstance(answers, list) or not all(answer is None or isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers must be a list of texts of at most {_MOST_BYTES >> 20} MiB")
    if rows is not None and len(answers) != rows:
        raise ValueError(f"there must be {rows} answers, found {len(answers)}")
    return answers
