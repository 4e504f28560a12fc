"""`FILE` arguments: paths, globs, `.gz`, and the language, given as `de=FILE` or read from the file's name."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Self

from ...errors import DataError
from ...io.files import sha256
from ...io.json_types import JsonObject, JsonValue
from ...options.existing import require_data
from ...options.fields import ROWS
from ...provenance.row_hashes import ListedRows, RowHashes, RowTexts, remember
from .languages import given_languages, languages_of, single_languages_of

_ARGUMENT = re.compile(r"(?P<language>[a-zA-Z]{2,3}(?:[-_][A-Za-z]{2,4})*)=(?P<path>.+)", re.DOTALL)
MOST_LINE = 2**27
"""Bytes of a line at most: some sets of questions are one JSON document on one line."""
MOST_EXPANSION, FEW_BYTES = 200, 2**24
"""How many times as long as its file a compressed text may be (text is 3 to 20 times); short texts may be any."""


class UsedRows:
    """The rows of a file that a reader returned.

    Args:
        texts: The texts of each row, computed at the first use.
        picked: The `START:STOP[:STEP]` that chose them, None for all.
    """

    def __init__(self, texts: Callable[[], Iterable[RowTexts]], picked: str | None = None) -> None:
        self._texts, self.picked = texts, picked

    @cached_property
    def listed(self) -> ListedRows:
        """Return the hashes of the rows, in order."""
        return ListedRows.of(self._texts())

    def entry(self) -> dict[str, object]:
        """Return how many rows a manifest names, which, and the name of the set of their hashes."""
        picked = {} if self.picked is None else {"picked": self.picked}
        return {"rows": len(self.listed.whole), **picked, "row_hashes": remember(self.listed.hashes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One data file.

    Args:
        path: Its path.
        languages: Language codes from the argument or the file's name: one, two for pairs, or an empty tuple.
        is_given: Whether they come from an argument such as `de=FILE`, which takes precedence over the rows.
        left_out: Rows of it that were read and left out.
        tasks: Names of the tasks that its rows suit; empty if that is unknown.
        used: The rows that a reader returned; None before a reader has read the file.
    """

    path: Path
    languages: tuple[str, ...]
    is_given: bool = False
    left_out: int = 0
    tasks: tuple[str, ...] = ()
    used: UsedRows | None = field(default=None, compare=False, repr=False)

    @property
    def language(self) -> str | None:
        """The one language, if there is just one."""
        return self.languages[0] if len(self.languages) == 1 else None

    @property
    def suffixes(self) -> list[str]:
        """Suffixes of its name, which determine the format."""
        return self.path.suffixes

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield numbered lines without their ends, from 1.

        Raises:
            DataError: the file is not UTF-8, its compression is broken or hides far more than a text can, or a line is
                longer than `MOST_LINE` bytes.
        """
        opener = gzip.open if self.path.suffix == ".gz" else open
        number = 0
        try:
            # decoded line by line, so that a fault is reported at its own line
            with opener(self.path, "rb") as file:
                for raw in self._raw_lines(file):
                    line = raw.decode("utf-8-sig" if number == 0 else "utf-8")
                    number += 1
                    yield number, line.rstrip("\r\n")
        except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{self.path}:{number + 1}: the file must be UTF-8 text (.gz allowed): {error}.", code="data.not-utf8"
            ) from error

    def _raw_lines(self, file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
        """Yield the lines of an open file, and stop before an absurd one fills the memory."""
        most = max(FEW_BYTES, MOST_EXPANSION * self.path.stat().st_size)
        total = number = 0
        while raw := file.readline(MOST_LINE + 1):
            number += 1
            total += len(raw)
            if len(raw) > MOST_LINE:
                raise DataError(
                    f"{self.path}:{number}: a line must have at most {MOST_LINE:,} bytes, and this one is longer. Give "
                    "a file with one row a line.",
                    code="data.long-line",
                )
            if total > most:
                raise DataError(
                    f"{self.path}:{number}: a compressed text must not be more than {MOST_EXPANSION} times as long as "
                    "its file, and this one is. Unpack it, and look at what it holds.",
                    code="data.compressed",
                )
            yield raw

    def json_rows(self) -> Iterator[tuple[int, JsonObject]]:
        """Yield numbered JSON objects, one a line, without unpaired surrogates; blank lines are skipped.

        Raises:
            DataError: a line is not a JSON object.
        """
        for number, line in self.lines():
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row = sound(row) if "\\u" in line else row
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.path}:{number}: every line must be JSON, found {line.strip()[:60]!r}.", code="row.not-json"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{self.path}:{number}: every line must be a JSON object, found {type(row).__name__}.",
                    code="row.not-object",
                )
            yield number, row

    def check(self) -> None:
        """Refuse folders and empty files.

        Raises:
            DataError: the path is a folder, or the file is empty.
        """
        if not self.path.is_file():
            raise DataError(
                f"a data file is needed, and {self.path} is a folder. Give its files, or a glob.", code="data.is-folder"
            )
        if self.path.stat().st_size == 0:
            raise DataError(f"a data file must hold rows, and {self.path} is empty.", code="data.empty")

    @property
    def title(self) -> str:
        """Name in manifests."""
        return self.path.name

    def hashes(self) -> dict[str, str]:
        """Return `sha256`, the hash of the file's bytes, and `text`, see `text_hash`."""
        return {"sha256": sha256(self.path), "text": text_hash(self)}

    def entry(self) -> dict[str, object]:
        """Return the manifest's entry on the file and on its rows that are used."""
        used = self.used.entry() if self.used else {}
        return {"name": self.title, "languages": list(self.languages), **self.hashes(), **used}

    def row_hashes(self) -> RowHashes | None:
        """Return the hashes of the rows that are used; None before a reader has read the file."""
        return self.used.listed.hashes if self.used else None

    def using(self, texts: Callable[[], Iterable[RowTexts]], picked: str | None, left_out: int = 0) -> Self:
        """Return the file with the rows of it that are used.

        Args:
            texts: See `UsedRows`.
            picked: See `UsedRows`.
            left_out: Rows that were read and left out.
        """
        return replace(self, used=UsedRows(texts, picked), left_out=left_out)


OPENERS: dict[str, Callable[[str, tuple[str, ...]], Sequence[DataFile]]] = {}
"""Openers of data other than text, by the word before the colon of an argument or by suffix."""


def text_hash(file: DataFile) -> str:
    """Return the hash of a file's lines, unpacked, without their ends and without blank ones at its end."""
    if type(file) is not DataFile:  # of the Hub
        return file.hashes()["text"]
    status = file.path.stat()
    return _hash_of_lines(file.path.absolute(), (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1024)
def _hash_of_lines(path: Path, _status: tuple[int, int, int]) -> str:
    """Return the hash of a file's lines; cached, since each candidate of a search needs it."""
    digest, blank = hashlib.sha256(), 0
    for _, line in DataFile(path=path, languages=()).lines():
        if line.strip():
            digest.update(b"\n" * blank + line.rstrip().encode() + b"\n")
        blank = 0 if line.strip() else blank + 1
    return digest.hexdigest()


_HALF = re.compile("[\ud800-\udfff]")


def sound(value: JsonValue) -> JsonValue:
    r"""Return JSON data with U+FFFD instead of halves of surrogate pairs, which tokenizers and files refuse.

    Example:
        >>> sound({"text": ["a\ud83d", 1]}) == {"text": ["a\ufffd", 1]}
        True
    """
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [sound(item) for item in value]
    if isinstance(value, dict):
        return {sound(key): sound(item) for key, item in value.items()}
    return value


def several_languages(file: DataFile) -> str:
    """Return the end of a message on an unknown language, for a file whose name has several languages."""
    codes = single_languages_of(file.path)
    return f", and its name has {' and '.join(map(repr, codes))}" if len(codes) > 1 and not file.languages else ""


def find_files(arguments: Sequence[str], task: str | None = None) -> list[DataFile]:
    """Resolve `FILE` arguments.

    Args:
        arguments: Paths or globs, each with an optional `LANGUAGE=` (or `LANGUAGE-LANGUAGE=`) in front.
        task: Name of the task that reads them; None if any may.

    Raises:
        DataError: no file matches, a file is empty, a form is not handled, or the rows suit other tasks only.
    """
    files: list[DataFile] = []
    for argument in arguments:
        languages, pattern = _split_languages(argument)
        prefix, colon, _ = pattern.partition(":")
        opener = OPENERS.get(prefix) if colon else None
        if opener:
            files += opener(pattern, languages)
            continue
        for path in require_data(pattern):
            if by_suffix := OPENERS.get(path.suffix):
                files += by_suffix(str(path), languages)
                continue
            files.append(DataFile(path=path, languages=languages or languages_of(path), is_given=bool(languages)))
    for file in files:
        file.check()
        if task and file.tasks and task not in file.tasks:
            raise DataError(
                f"{file.path}: the data must suit the task '{task}', and they are for {' and '.join(file.tasks)}.",
                code="data.task",
            )
    if not files:
        raise DataError("at least one data file is needed, got none.", code="data.no-file")
    return files


def _split_languages(argument: str) -> tuple[tuple[str, ...], str]:
    match = _ARGUMENT.fullmatch(argument)
    if Path(argument).exists():
        return (), argument
    if match is None:
        left, equals, right = argument.partition("=")
        if equals and glob.glob(right):
            raise DataError(
                f"the text before = must be a language code, such as de, or de-en for pairs, found {left!r} in "
                f"{argument!r}.",
                code="data.language-code",
            )
        return (), argument
    languages = given_languages(match["language"])
    return ((), argument) if languages is None else (languages, match["path"])


def parse_rows(rows: str | None) -> slice:
    """Return the slice for `START:STOP` or `START:STOP:STEP` (each may be missing), which picks rows of every file.

    Raises:
        DataError: another form.

    Example:
        >>> parse_rows("500:"), parse_rows("::10")
        (slice(500, None, None), slice(None, None, 10))
    """
    if rows is None:
        return slice(None)
    match = ROWS.fullmatch(rows)
    if match is None:
        raise DataError(
            f"--rows must be START:STOP, or with :STEP, in whole numbers, such as 0:300, 500: or ::10, got {rows!r}.",
            code="data.rows-option",
        )
    return slice(*(int(match[part]) if match[part] else None for part in ("start", "stop", "step")))
