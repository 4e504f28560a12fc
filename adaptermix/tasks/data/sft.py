"""Prompts with answers and conversations, as instruction tuning has them: JSONL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...errors import DataError
from ...provenance.row_hashes import SHORT_BYTES, RowTexts
from .files import DataFile, find_files
from .tables import LANGUAGE_NAMES, pick_rows, row_cluster, row_language

UNKNOWN_LANGUAGE = "und"
_PROMPTS = ("prompt", "instruction", "question")
_CONTEXT = "input"
_ANSWERS = ("answer", "output", "response", "completion")
_ROLES = ("system", "user", "assistant")

Turn = tuple[str, str]
"""Role (`system`, `user` or `assistant`) and content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftRow:
    """A conversation and how it goes on.

    Args:
        turns: The turns before the answer, the last one the user's.
        answer: What the assistant says next.
        language: Language code, `und` where nothing tells it.
        cluster: Name of the group of dependent rows that this one belongs to, such as a document; empty for none.
    """

    turns: tuple[Turn, ...]
    answer: str
    language: str
    cluster: str = ""

    @property
    def row_texts(self) -> RowTexts:
        """Return the texts by which the row is recognised in other files: the turns, their lines, and the answer.

        A line may be a row of another task below its instruction, as the `input` of Alpaca is. System turns do not
        count, since they are often the same in all rows and differ by format.
        """
        turns = [content for role, content in self.turns if role != "system"]
        lines = [line for turn in turns if "\n" in turn for line in turn.splitlines() if len(line) >= SHORT_BYTES]
        return RowTexts(("\n".join(turns),), further=(*(turns if len(turns) > 1 else ()), *lines, self.answer))


def _text(where: str, row: Mapping[str, object], name: str) -> str:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {name!r} must be text or a number, found {type(value).__name__}.")
    return str(value).strip()


def _from_fields(where: str, row: Mapping[str, object]) -> tuple[tuple[Turn, ...], str]:
    ask = next((name for name in (*_PROMPTS, _CONTEXT) if row.get(name) is not None), None)
    tell = next((name for name in _ANSWERS if row.get(name) is not None), None)
    if ask is None or tell is None:
        raise DataError(
            f"{where}: a row must have 'messages', or a prompt ({', '.join((*_PROMPTS, _CONTEXT))}) and an answer "
            f"({', '.join(_ANSWERS)}), found the fields {', '.join(sorted(row)) or 'none'}."
        )
    prompt = _text(where, row, ask)
    # an instruction about a text, as Alpaca has it
    if ask != _CONTEXT and row.get(_CONTEXT) is not None and (context := _text(where, row, _CONTEXT)):
        prompt = f"{prompt}\n\n{context}"
    return (("user", prompt),), _text(where, row, tell)


def _from_messages(where: str, messages: object) -> tuple[tuple[Turn, ...], str] | None:
    """Return the turns before the answer, and the answer; None if a turn but the system's is empty."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: 'messages' must be a list of at least two turns, found {str(messages)[:60]!r}.")
    turns: list[Turn] = []
    is_empty = False
    for place, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in _ROLES or not isinstance(content, str | None):
            raise DataError(
                f"{where}: each of 'messages' must have a 'role' ({', '.join(_ROLES)}) and its 'content' as text, "
                f"found {str(message)[:60]!r} at place {place}."
            )
        if (content := (content or "").strip()) or role != "system":
            turns.append((role, content))
        is_empty = is_empty or (not content and role != "system")
    if is_empty:
        return None
    *before, (last, answer) = turns
    if last != "assistant" or not before or before[-1][0] != "user":
        raise DataError(
            f"{where}: 'messages' must end with a turn of the user and the assistant's answer, found "
            f"{', '.join(role for role, _ in turns[-3:])} at the end."
        )
    return tuple(before), answer


def _read(file: DataFile) -> Iterator[SftRow | None]:
    for number, row in file.json_rows():
        where = f"{file.path}:{number}"
        by_turns = row.get("messages") is not None
        found = _from_messages(where, row["messages"]) if by_turns else _from_fields(where, row)
        if found is None or not found[1] or not found[0][-1][1]:
            yield None  # collections such as Alpaca hold a few without an answer
            continue
        turns, answer = found
        named = next((str(row[name]) for name in LANGUAGE_NAMES if row.get(name)), None)
        language = row_language(file, named) if named or file.language else UNKNOWN_LANGUAGE
        yield SftRow(turns=turns, answer=answer, language=language, cluster=row_cluster(row))


def read_sft(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[SftRow], list[DataFile]]:
    """Read prompts with answers.

    The language is the one given (`de=FILE`), else that of the row's field `language`, else that of the file's name,
    else `und`, since instruction data seldom tell it.

    Args:
        arguments: `FILE` arguments: JSONL with `messages`, a list of `role` and `content` that ends with the answer; or
            with `prompt` and `answer`, also called `instruction` (with `input` below it) and `output`, `question`,
            `response`, `completion`.
        rows: `START:STOP[:STEP]` of the rows of each file. Rows with an empty prompt or answer are left out; they
            count as rows.

    Raises:
        DataError: a file is missing, empty or malformed.
    """
    files = find_files(arguments)
    return pick_rows(files, rows, _read)
