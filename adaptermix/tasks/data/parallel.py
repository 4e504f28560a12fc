"""Texts to retrieve translations in: pair files, or one text per language with line i the translation of line i."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, permutations

from ...errors import DataError
from .files import DataFile, find_files, parse_rows
from .pairs import read_pairs
from .tables import lines_used


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelText:
    """Sentences to embed, and which lists are translations of which.

    Args:
        texts: Sentences by a key unique to the list (a language, or `de-en:de` where pairs differ by file).
        directions: (name, key of the queries, key of the candidates), such as ("de-en", ...).
        files: Their files.
    """

    texts: dict[str, list[str]]
    directions: list[tuple[str, str, str]]
    files: list[DataFile]


def is_lines(file: DataFile) -> bool:
    """Return whether a file has one sentence a line: one language, and no tab in its first line."""
    if len(file.languages) != 1 or ".jsonl" in file.suffixes or ".csv" in file.suffixes:
        return False
    first = next((line for _, line in file.lines() if line.strip()), "")
    return "\t" not in first


def read_parallel(arguments: Sequence[str], *, rows: str | None = None) -> ParallelText:
    """Read the texts of `retrieve`.

    Args:
        arguments: `FILE` arguments: pair files (`deu-eng.tsv`), or line-parallel texts (`deu.txt eng.txt`).
        rows: `START:STOP[:STEP]` of the rows of each file.

    Raises:
        DataError: a file is missing or empty, the texts differ in length, or a language or direction occurs twice.
    """
    files = find_files(arguments)
    return _from_lines(files, rows) if all(is_lines(file) for file in files) else _from_pairs(arguments, rows)


def _from_lines(files: list[DataFile], rows: str | None) -> ParallelText:
    chosen = parse_rows(rows)
    texts: dict[str, list[str]] = {}
    lengths: dict[str, int] = {}
    for file in files:
        language = file.languages[0]
        if language in texts:
            raise DataError(
                f"{file.path}: one text per language is needed, and '{language}' occurs twice.",
                code="parallel.language-twice",
            )
        lines = file.lines()
        texts[language] = [line.strip() for _, line in islice(lines, chosen.stop)]
        lengths[language] = len(texts[language]) + sum(1 for _ in lines)
    if len(texts) < 2 or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(
            "retrieval needs at least two texts with equally many lines (line i translates line i), found "
            + ", ".join(f"{language} {count}" for language, count in lengths.items())
            + ".",
            code="parallel.line-count",
        )
    # as in pair files, rows with an empty side are left out
    picked = list(zip(*texts.values(), strict=True))[chosen]
    filled = [row for row in picked if all(row)]
    if not filled:
        raise DataError(
            f"retrieval needs lines that no text leaves blank, in the requested rows ({rows or 'all'}); the texts have "
            f"{next(iter(lengths.values()))}.",
            code="parallel.no-lines",
        )
    texts = {language: list(lines) for language, lines in zip(texts, zip(*filled, strict=True), strict=True)}
    directions = [(f"{one}-{two}", one, two) for one, two in permutations(texts, 2)]
    used = [lines_used(file, texts[file.languages[0]], rows) for file in files]
    return ParallelText(texts=texts, directions=directions, files=used)


def _from_pairs(arguments: Sequence[str], rows: str | None) -> ParallelText:
    pairs, files = read_pairs(arguments, rows=rows)
    known = {pair.languages for pair in pairs}
    if twice := sorted(f"{one}-{two}" for one, two in known if (two, one) in known):
        raise DataError(
            f"retrieval needs every direction once, from one language to another; found {', '.join(twice)}.",
            code="parallel.directions",
        )
    texts: dict[str, list[str]] = {}
    for pair in pairs:
        one, two = pair.languages
        texts.setdefault(f"{one}-{two}:{one}", []).append(pair.source)
        texts.setdefault(f"{one}-{two}:{two}", []).append(pair.target)
    directions = []
    for one, two in dict.fromkeys(pair.languages for pair in pairs):
        key = f"{one}-{two}"
        directions += [(key, f"{key}:{one}", f"{key}:{two}"), (f"{two}-{one}", f"{key}:{two}", f"{key}:{one}")]
    return ParallelText(texts=texts, directions=directions, files=files)
