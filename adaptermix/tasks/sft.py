"""Instruction following: prompts with answers, or conversations and their next turn, as JSONL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError
from ..provenance.row_hashes import SHORT_BYTES, RowTexts
from .base import BaseTask, task
from .data.files import DataFile
from .data.tables import LANGUAGE_NAMES, Row, row_cluster, row_language
from .metrics import Metric, mean, mean_ends
from .overlap import chrf, chrf_counts
from .prompts import Template, table

UNKNOWN_LANGUAGE = "und"
_PROMPTS = ("prompt", "instruction", "question", "inputs")
_CONTEXT = "input"
_ANSWERS = ("answer", "output", "response", "completion", "targets")
_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

Turn = tuple[str, str]
"""Role (`system`, `user` or `assistant`) and content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftRow(Row):
    """A conversation and its next turn.

    Args:
        turns: The turns before the answer, the last one the user's.
        answer: The assistant's next turn.
    """

    turns: tuple[Turn, ...]
    answer: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (format_turns(self.turns),)

    @property
    def row_texts(self) -> RowTexts:
        """The turns, their lines, and the answer.

        A line may be a row of another task below its instruction, as the `input` of Alpaca is. System turns are left
        out, since they are often the same in all rows and differ by format.
        """
        turns = [content for role, content in self.turns if role != "system"]
        lines = [line for turn in turns if "\n" in turn for line in turn.splitlines() if len(line) >= SHORT_BYTES]
        return RowTexts(("\n".join(turns),), further=(*(turns if len(turns) > 1 else ()), *lines, self.answer))


def format_turns(turns: Sequence[Turn]) -> str:
    r"""Return a conversation as plain text, for models without a chat template.

    Speakers are named only if there is a turn of the assistant. Otherwise the text is the prompt, below the system
    turn if there is one.

    Example:
        >>> format_turns([("system", "Be brief."), ("user", "Hi")])
        'Be brief.\n\nHi'
        >>> format_turns([("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")])
        'User: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:'
    """
    if all(role != "assistant" for role, _ in turns):
        return "\n\n".join(content for _, content in turns)
    said = [content if role == "system" else f"{role.capitalize()}: {content}" for role, content in turns]
    return "\n\n".join([*said, "Assistant:"])


def _text(where: str, row: Mapping[str, object], name: str) -> str:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"{where}: {name!r} must be text or a number, found {type(value).__name__}.", code="sft.not-text"
        )
    return str(value).strip()


def _from_fields(where: str, row: Mapping[str, object]) -> tuple[tuple[Turn, ...], str]:
    prompt_name = next((name for name in (*_PROMPTS, _CONTEXT) if row.get(name) is not None), None)
    answer_name = next((name for name in _ANSWERS if row.get(name) is not None), None)
    if prompt_name is None or answer_name is None:
        raise DataError(
            f"{where}: a row must have 'messages', or a prompt ({', '.join((*_PROMPTS, _CONTEXT))}) and an answer "
            f"({', '.join(_ANSWERS)}), found the fields {', '.join(sorted(row)) or 'none'}.",
            code="sft.fields",
        )
    prompt = _text(where, row, prompt_name)
    # Alpaca has instructions about a text.
    if prompt_name != _CONTEXT and row.get(_CONTEXT) is not None and (context := _text(where, row, _CONTEXT)):
        prompt = f"{prompt}\n\n{context}"
    return (("user", prompt),), _text(where, row, answer_name)


def _sharegpt(turns: object) -> object:
    """Return the turns of ShareGPT's `conversations` (`from`, `value`) as `messages`; other values unchanged."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    return [
        {"role": _SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")} for turn in turns
    ]


def _from_messages(where: str, messages: object) -> tuple[tuple[Turn, ...], str] | None:
    """Return the turns before the answer, and the answer; None if a turn but the system's is empty."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            f"{where}: 'messages' must be a list of at least two turns, found {str(messages)[:60]!r}.",
            code="sft.too-few-turns",
        )
    turns: list[Turn] = []
    is_empty = False
    for number, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in _ROLES or not isinstance(content, str | None):
            raise DataError(
                f"{where}: each of 'messages' must have a 'role' ({', '.join(_ROLES)}) and its 'content' as text, "
                f"found {str(message)[:60]!r} at place {number}.",
                code="sft.turn",
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
            f"{', '.join(role for role, _ in turns[-3:])} at the end.",
            code="sft.last-turn",
        )
    return tuple(before), answer


def _exact_counts(row: SftRow, answer: str) -> Sequence[float]:
    return answer.strip() == row.answer, 1


def _chrf_counts(row: SftRow, answer: str) -> Sequence[float]:
    return chrf_counts(row.answer, answer)


@task
class Sft(BaseTask[SftRow]):
    """Supervised fine-tuning on answers, scored by exact match and chrF2.

    Exact match, in [0, 1], is for answers with one right form and ignores blanks at their ends. `chrf` is computed
    over the whole set of answers, in [0, 100]; see `adaptermix.tasks.overlap`.

    Files are JSONL with `messages`, a list of `role` and `content` that ends with the answer, or ShareGPT's
    `conversations` (`from`, `value`); or with `prompt` and
    `answer`, also called `instruction` (with `input` below it) and `output`, `question`, `response`, `completion`,
    `inputs`, `targets`. Rows with an empty prompt or answer are left out. The language comes from the argument
    (`de=FILE`), else the
    row's `language`, else the file's name, else it is `und`, since instruction data seldom have it.
    """

    name = "sft"
    text_field = "prompt"
    blank = {"answer": "-"}
    one_line = False
    is_open = True
    templates = table(
        Template(name="plain", prompt="{prompt}\n"),
        Template(name="chat", prompt="{prompt}", chat=True, turns="turns"),
    )

    def rows_of(self, file: DataFile) -> Iterator[SftRow | None]:
        for number, row in file.json_rows():
            where = f"{file.path}:{number}"
            messages = _sharegpt(row.get("conversations")) if row.get("messages") is None else row["messages"]
            parsed = _from_fields(where, row) if messages is None else _from_messages(where, messages)
            if parsed is None or not parsed[1] or not parsed[0][-1][1]:
                yield None  # collections such as Alpaca have a few rows without an answer
                continue
            turns, answer = parsed
            named = next((str(row[name]) for name in LANGUAGE_NAMES if row.get(name)), None)
            language = row_language(file, named) if named or file.language else UNKNOWN_LANGUAGE
            yield SftRow(turns=turns, answer=answer, language=language, cluster=row_cluster(row))

    def fields(self, row: SftRow) -> Mapping[str, object]:
        return {"prompt": format_turns(row.turns), "turns": row.turns}

    def answer(self, row: SftRow) -> str:
        return row.answer

    def metrics(self, rows: Sequence[SftRow]) -> tuple[Metric, ...]:
        return (
            Metric(name="exact_match", count=_exact_counts, value=mean, ends=mean_ends),
            Metric(name="chrf", count=_chrf_counts, value=chrf),
        )
