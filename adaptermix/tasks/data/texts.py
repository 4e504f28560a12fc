"""Plain texts, for objectives and statistics that need no labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ...errors import DataError
from .files import DataFile, find_files, parse_rows
from .tables import lines_used


def texts_of(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[str], list[DataFile]]:
    """Return the texts of files, without duplicates, and the files.

    Texts are lines, the first column of TSV, or in JSONL the field `text` or else all strings of a row.

    Args:
        arguments: `FILE` arguments.
        rows: `START:STOP[:STEP]` of the texts of each file.

    Raises:
        DataError: a file is missing, or is JSONL under another name.
    """
    texts: list[str] = []
    files = []
    picked = parse_rows(rows)
    for file in find_files(arguments):
        lines: list[str] = []  # Those after the last row of the range are not read.
        if ".jsonl" in file.suffixes:
            for _, row in islice(file.json_rows(), picked.stop):
                text = row.get("text")
                strings = [text] if isinstance(text, str) else [v for v in row.values() if isinstance(v, str)]
                lines.append(" ".join(strings))
        else:
            lines = [line.partition("\t")[0].strip() for _, line in islice(file.lines(), picked.stop)]
            if lines and lines[0].startswith("{"):
                raise DataError(
                    f"{file.path} must be named .jsonl for its JSON to be read, and holds '{lines[0][:40]}'.",
                    code="calibration.not-jsonl",
                )
        chosen = list(filter(None, lines[picked]))
        texts += chosen
        files.append(lines_used(file, chosen, rows))
    return list(dict.fromkeys(texts)), files
