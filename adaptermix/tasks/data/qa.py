"""Questions on a text: SQuAD JSON, as XQuAD and MLQA have it too, and JSONL with one question a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from ...provenance.row_hashes import RowTexts
from .files import DataFile, find_files, sound
from .tables import LANGUAGE_NAMES, pick_rows, row_cluster, row_language


@dataclass(frozen=True, slots=True, kw_only=True)
class QaRow:
    """A question on a text.

    Args:
        question: The question.
        context: The text.
        answers: All right answers as they stand in the text; none where the text does not answer.
        language: Language code.
        id: The question's name in its data set, which is the same in all languages of XQuAD; empty where it has none.
        places: First character of each answer in the text and the one after its last; None where it is not there.
        cluster: Name of the group of dependent rows that this one belongs to, such as a document; empty for none.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    language: str
    id: str = ""
    places: tuple[tuple[int, int] | None, ...] = ()
    cluster: str = ""

    @property
    def row_texts(self) -> RowTexts:
        """Return the texts by which the row is recognised in other files."""
        return RowTexts((self.question, self.context))


def _answers(where: str, row: Mapping[str, Any]) -> dict[str, object]:
    """Return the answers with where they are said to begin, if they are.

    Taken are a list of texts or of {"text": ...}, one text, or {"text": [...]} as the Hub's export of SQuAD has it.
    """
    if row.get("is_impossible") is True:
        return {}  # further "answers" are plausible ones only
    given = row.get("answers", row.get("answer"))
    listed = given.get("text") if isinstance(given, dict) else given
    items = [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else [None]
    texts: list[Any] = [item.get("text") if isinstance(item, dict) else item for item in items]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f'{where}: a question must have "answers", a list of texts or of {{"text": ...}}, empty where there is '
            f"none, found {str(given)[:60]!r}."
        )
    starts = given.get("answer_start") if isinstance(given, dict) else None
    begins = [item.get("answer_start") if isinstance(item, dict) else None for item in items]
    if isinstance(starts, list) and len(starts) == len(items):
        begins = starts
    found: dict[str, object] = {}
    for text, begin in zip(texts, begins, strict=True):
        if text.strip():
            found.setdefault(" ".join(text.split()), begin)  # one spelling occurs once per annotator
    return found


def _place(context: str, answer: str, begin: object) -> tuple[int, int] | None:
    """Return the characters of an answer: where it is found nearest to where it is said to begin, else first."""
    near = begin if isinstance(begin, int) else 0
    pattern = r"\s+".join(map(re.escape, answer.split()))
    spans = [match.span() for match in re.finditer(pattern, context)]
    return min(spans, key=lambda span: abs(span[0] - near), default=None)


def _row(file: DataFile, where: str, question: Mapping[str, Any], context: object) -> QaRow | None:
    """Return a question; None for one whose question or text is empty."""
    asked = question.get("question")
    for name, value in (("question", asked), ("context", context)):
        if not isinstance(value, str):
            raise DataError(f"{where}: a row must have its {name!r} as text, found {str(value)[:60]!r}.")
    if not str(asked).strip() or not str(context).strip():
        return None
    named = next((str(question[name]) for name in LANGUAGE_NAMES if question.get(name)), None)
    key = question.get("id")
    answers = _answers(where, question)
    whole = str(context).rstrip()
    blank = len(whole) - len(whole.lstrip())
    found = [_place(whole, answer, begin) for answer, begin in answers.items()]
    return QaRow(
        question=str(asked).strip(),
        context=whole.strip(),
        answers=tuple(answers),
        language=row_language(file, named),
        id="" if key is None else str(key),
        cluster=row_cluster(question),
        places=tuple(place and (place[0] - blank, place[1] - blank) for place in found),
    )


def _items(where: str, value: object, name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the objects in a field that is a list of them, each with where it is."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{where}: {name!r} must be a list of objects, as in SQuAD, found {str(value)[:60]!r}.")
    return [(f"{name}[{place}]", item) for place, item in enumerate(value)]


def _squad(file: DataFile, text: str) -> Iterator[QaRow | None]:
    try:
        document = sound(json.loads(text))
    except json.JSONDecodeError as error:
        found = text.splitlines()[error.lineno - 1 :][:1]
        raise DataError(
            f"{file.path}:{error.lineno}: question data must be SQuAD JSON, or JSONL with one question a line, found "
            f"{''.join(found).strip()[:60]!r}."
        ) from error
    except (RecursionError, ValueError) as error:  # nesting, or numbers of thousands of digits
        raise DataError(
            f"{file.path}:1: question data must be SQuAD JSON, and this is nested too deep, or holds a number of "
            "thousands of digits."
        ) from error
    if not isinstance(document, dict) or "data" not in document:
        raise DataError(f"{file.path}:1: SQuAD JSON must be an object with 'data', found {text.strip()[:60]!r}.")
    for article, value in _items(str(file.path), document["data"], "data"):
        for paragraph, block in _items(f"{file.path}: {article}", value.get("paragraphs"), "paragraphs"):
            place = f"{file.path}: {article}.{paragraph}"
            for name, question in _items(place, block.get("qas"), "qas"):
                yield _row(file, f"{place}.{name}", question, block.get("context"))


def _has_rows(file: DataFile) -> bool:
    """Tell JSONL from SQuAD JSON, which may be one line too."""
    if ".jsonl" in file.suffixes:
        return True
    first = next((line for _, line in file.lines() if line.strip()), "")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "data" not in row


def _read(file: DataFile) -> Iterator[QaRow | None]:
    if not _has_rows(file):
        yield from _squad(file, "\n".join(line for _, line in file.lines()))
        return
    for number, row in file.json_rows():
        is_null = any(name in row and row[name] is None for name in ("question", "context"))
        yield None if is_null else _row(file, f"{file.path}:{number}", row, row.get("context"))


def read_qa(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[QaRow], list[DataFile]]:
    """Read questions on texts.

    The language is the one given (`de=FILE`), else that of the question's field `language`, else that of the file's
    name. Where MLQA has texts and questions in two languages, give that of the texts, which is that of the answers.

    Args:
        arguments: `FILE` arguments: SQuAD JSON of version 1.1 or 2.0, or JSONL with `question`, `context` and
            `answers`.
        rows: `START:STOP[:STEP]` of the questions of each file.

    Raises:
        DataError: a file is missing, empty, malformed, or does not tell its language.
    """
    files = find_files(arguments)
    return pick_rows(files, rows, _read)
