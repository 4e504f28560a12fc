"""What a generative task is, and the table of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..data import DataFile
from ..errors import PlanError
from .slots import Counts, Slots

__all__ = ["TASKS", "Counts", "Example", "Task", "get_task"]


class Example(NamedTuple):
    """One row as a language model sees it."""

    text: str
    answer: str


class Task(Protocol):
    """Rows in, prompts and answers out; generated answers in, counts out."""

    @property
    def name(self) -> str:
        """Name in the table."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of its scores, the headline first."""

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[Sequence[Any], list[DataFile]]:
        """Read rows from `FILE` arguments."""

    def text(self, row: Any) -> str:
        """Return what the prompt asks about."""

    def answer(self, row: Any) -> str:
        """Return the answer that training teaches."""

    def language(self, row: Any) -> str:
        """Return the row's language."""

    def count(self, row: Any, answer: str) -> Mapping[str, Counts]:
        """Compare a generated answer with the row, per metric; metrics that the row cannot give are left out."""


TASKS: dict[str, Task] = {task.name: task for task in (Slots(),)}


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        PlanError: there is none of this name.
    """
    if name not in TASKS:
        raise PlanError(f"--task must be one of {', '.join(sorted(TASKS))}, got {name!r}.")
    return TASKS[name]
