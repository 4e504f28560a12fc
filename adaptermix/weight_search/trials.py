"""Trials, and their answers as plain text, which every storage can hold."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .space import Candidate

_MOST_BYTES = 2**28
"""Largest unpacked size of the answers of a trial, since a few forged bytes could unpack to more than the memory."""

Answers = Sequence[str | None]
"""One answer per dev row; None for a row that the model has not answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate with its answers.

    Args:
        number: Number of the trial.
        candidate: The candidate.
        answers: One answer per dev row; None for rows after the trial was stopped.
        seconds: Time that the answers took.
    """

    number: int
    candidate: Candidate
    answers: tuple[str | None, ...] = ()
    seconds: float = 0.0

    def on_rows_of(self, other: Trial) -> Trial:
        """Return the trial with answers only for rows that the other trial has answered too."""
        pairs = zip(self.answers, other.answers, strict=True)
        return replace(self, answers=tuple(answer if theirs is not None else None for answer, theirs in pairs))

    @property
    def rows(self) -> int:
        """The number of answered rows."""
        return sum(answer is not None for answer in self.answers)

    @property
    def is_whole(self) -> bool:
        """Whether all rows are answered."""
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
        rows: Expected number of answers; None to accept any number.

    Raises:
        ValueError: the text is not a line of `pack`, has another number of answers, or is too large.
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
