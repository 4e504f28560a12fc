"""Rows of a task as token ids of prompt and answer, and which of them can teach their answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..models.mixed_rows import MixedRows
from ..progress import SILENT, Watcher
from ..tasks import SpanTask, Task, Template
from ..tasks.data.prompt_ids import PromptIds
from ..tasks.data.report import by_language
from ..tasks.data.tables import Row
from ..tasks.heads.base import cut_warning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = tuple[list[int], list[int]]
"""Token ids of the prompt and of the answer."""


class Examples(list[Example]):
    """Encoded rows.

    Args:
        examples: All rows.
        taught: Numbers of the rows that can teach their answer. Training leaves the others out: they had to be cut so
            short that their answer no longer follows from their prompt.
        notes: Messages on rows that were cut or left out.
    """

    def __init__(self, examples: Sequence[Example], taught: Sequence[int], notes: Sequence[str] = ()) -> None:
        super().__init__(examples)
        self.taught, self.notes = list(taught), tuple(notes)


_CUT, _LOST, _ASTRAY = "cut", "lost", "astray"


def encode_rows(
    task: Task,
    template: Template,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    mixed: MixedRows | None = None,
    watch: Watcher = SILENT,
) -> Examples:
    """Return prompt and answer ids per row, at most `max_length` together.

    A text that a question asks about keeps the part around the answer. Other prompts that are too long lose their
    beginning, but for the special tokens that open them, such as the start token. Only answers of tasks whose answers
    are open lose their end, down to half of the length. Rows whose answer is then no longer in the prompt, or is
    cut itself, are not taught. Evaluation does not use this function, and asks every row in full.

    Args:
        task: The task.
        template: How prompts are made.
        rows: The rows.
        tokenizer: The base model's tokenizer.
        max_length: Most tokens of a row.
        mixed: How a stack that generates reads prompts.
        watch: Receives notes on rows that are cut or left out.
    """
    examples, taught = [], []
    languages: dict[str, list[str]] = {_CUT: [], _LOST: [], _ASTRAY: []}
    encoder = _Encoder(task, template, PromptIds(tokenizer=tokenizer, mixed=mixed), max_length)
    for number, row in enumerate(rows):
        example, fault = encoder(row)
        examples.append(example)
        if fault:
            languages[fault].append(task.language(row))
        if fault not in (_LOST, _ASTRAY):
            taught.append(number)
    notes = list(_notes(languages, len(rows), max_length))
    for note in notes:
        watch.note(note)
    return Examples(examples, taught, notes)


def _notes(languages: dict[str, list[str]], rows: int, max_length: int) -> Iterator[str]:
    if cut := languages[_CUT]:
        yield cut_warning(cut, rows, max_length, "a part of their prompts or answers")
    if lost := languages[_LOST]:
        yield (
            f"{by_language(lost, rows)} rows are longer than {max_length} tokens (--max-length), so that their answer "
            "would be cut away, and are left out."
        )
    if astray := languages[_ASTRAY]:
        yield f"{by_language(astray, rows)} rows have answers that do not occur in their texts, and are left out."


class _Encoder:
    """Encodes one row at a time; returns the example and its fault, if any."""

    def __init__(self, task: Task, template: Template, ids: PromptIds, max_length: int) -> None:
        self._task, self._template, self._ids, self._most = task, template, ids, max_length

    def __call__(self, row: Row) -> tuple[Example, str | None]:
        text = self._template.text_of(self._task.answer(row), self._task.fields(row))
        whole = self._template.encode_answer(text, self._ids.tokenizer)
        prompt = self._prompt(row)
        least = max(1, self._most - len(prompt), self._most // 2)
        answer = whole[: least if self._task.is_open else self._most]
        room = max(1, self._most - len(answer))
        fits = len(prompt) <= room and len(answer) == len(whole)
        if isinstance(self._task, SpanTask) and self._task.lacks_its_answer(row):
            return (self._ids.shortened(prompt, room), answer), _ASTRAY
        if fits:
            return (prompt, answer), None
        is_lost = len(answer) < len(whole) and not self._task.is_open
        if isinstance(self._task, SpanTask) and len(prompt) > room:
            around = self._around(row, room)
            fault = _CUT if around and not is_lost else _LOST
            return (around or self._ids.shortened(prompt, room), answer), fault
        left = self._ids.shortened(prompt, room)
        return (left, answer), _LOST if is_lost or self._lacks_evidence(row, prompt, left) else _CUT

    def _prompt(self, row: Row) -> list[int]:
        return self._ids.encode(self._template, self._task.fields(row), self._task.language(row))

    def _lacks_evidence(self, row: Row, before: list[int], after: list[int]) -> bool:
        """Whether cutting the prompt removed a part of the answer from it."""
        whole, left = (" ".join(self._ids.decode(ids).split()) for ids in (before, after))
        parts = [" ".join(part.split()) for part in self._task.evidence(row)]
        return any(part in whole and part not in left for part in parts)

    def _around(self, row: Row, room: int) -> list[int] | None:
        """Return the longest prompt that fits whose text holds the answer, if there is one."""
        assert isinstance(self._task, SpanTask)  # noqa: S101  (for the type checker)
        longest, low, high = None, 0, len(self._task.question_and_context(row)[1])
        while low < high:
            size = (low + high) // 2
            prompt = self._prompt(self._task.excerpt(row, size))
            if len(prompt) <= room:
                longest, low = prompt, size + 1
            else:
                high = size
        return longest
