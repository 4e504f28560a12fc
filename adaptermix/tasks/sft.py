"""Instruction following by generation: the answer to a prompt, or the next turn of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .data import DataFile, SftRow, read_sft
from .data.sft import Turn
from .metrics import Metric, mean, mean_ends
from .overlap import chrf, chrf_counts
from .prompts import Template, table


def format_turns(turns: Sequence[Turn]) -> str:
    r"""Return a conversation as plain text, for models without a chat template.

    A prompt, with or without a system turn, is its own text; only where the assistant has spoken before are the
    speakers named.

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


def _exact_counts(row: SftRow, answer: str) -> Sequence[float]:
    return answer.strip() == row.answer, 1


def _chrf_counts(row: SftRow, answer: str) -> Sequence[float]:
    return chrf_counts(row.answer, answer)


class Sft:
    """Supervised fine-tuning on answers, scored by exact match and chrF2.

    Exact match, in [0, 1], is for answers with one right form and does not regard blanks at their ends. `chrf` is that
    of the whole set of answers, in [0, 100]; see `adaptermix.tasks.overlap`.
    """

    name = "sft"
    one_line = False
    is_open = True
    templates: Mapping[str, Template] = table(
        Template(name="plain", prompt="{prompt}\n"),
        Template(name="chat", prompt="{prompt}", chat=True, turns="turns"),
    )

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[list[SftRow], list[DataFile]]:
        """Read prompts with answers, or conversations; see `adaptermix.tasks.data.sft`."""
        return read_sft(arguments, rows=rows)

    def fields(self, row: SftRow) -> Mapping[str, object]:
        """Return the turns, and as `prompt` their text."""
        return {"prompt": format_turns(row.turns), "turns": row.turns}

    def texts(self, row: SftRow) -> tuple[str, ...]:
        """Return the turns."""
        return (format_turns(row.turns),)

    def answer(self, row: SftRow) -> str:
        """Return the answer."""
        return row.answer

    def evidence(self, row: SftRow) -> tuple[str, ...]:  # noqa: ARG002
        """Return nothing: a part of the text may be enough for the answer."""
        return ()

    def language(self, row: SftRow) -> str:
        """Return the row's language, `und` where nothing tells it."""
        return row.language

    def metrics(self, rows: Sequence[SftRow]) -> tuple[Metric, ...]:  # noqa: ARG002
        """Return exact match and chrF2."""
        return (
            Metric(name="exact_match", count=_exact_counts, value=mean, ends=mean_ends),
            Metric(name="chrf", count=_chrf_counts, value=chrf),
        )
