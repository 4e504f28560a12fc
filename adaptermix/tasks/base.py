"""What a generative task is, and the table of tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ..errors import UsageError
from .classify import Classify
from .data import DataFile
from .metrics import Metric
from .ner_json import NerJson, format_entities
from .nli import Nli
from .prompts import Template
from .qa import UNANSWERABLE, Qa
from .sft import Sft
from .slots import NO_SLOTS, Slots
from .translate import Translate

__all__ = [
    "TASKS",
    "ComparableTask",
    "JoinableTask",
    "LabelTask",
    "SpanTask",
    "Task",
    "TokenTask",
    "clusters_of",
    "get_task",
    "get_template",
]


class Task(Protocol):
    """Rows in, prompts and answers out; generated answers in, statistics out."""

    @property
    def name(self) -> str:
        """Name in the table."""

    @property
    def templates(self) -> Mapping[str, Template]:
        """Prompt templates by name; the first is the default."""

    @property
    def one_line(self) -> bool:
        """Whether a line break ends an answer."""

    @property
    def is_open(self) -> bool:
        """Whether an answer may be taught without its end."""

    def read(self, arguments: Sequence[str], *, rows: str | None) -> tuple[Sequence[Any], list[DataFile]]:
        """Read rows from `FILE` arguments."""

    def fields(self, row: Any) -> Mapping[str, object]:
        """Return what the templates' placeholders stand for, and what else they use by name."""

    def texts(self, row: Any) -> tuple[str, ...]:
        """Return the texts that a row is about, without any prompt; for sft the turns as one text."""

    def answer(self, row: Any) -> str:
        """Return the answer that training teaches."""

    def evidence(self, row: Any) -> tuple[str, ...]:
        """Return parts of the row's text that must stand in the prompt for the answer to follow from it."""

    def language(self, row: Any) -> str:
        """Return the row's language; for translation the pair, such as `de-en`."""

    def metrics(self, rows: Sequence[Any]) -> tuple[Metric, ...]:
        """Return how these rows are scored, the headline metric first."""


_ALL: tuple[Task, ...] = (
    Classify(),
    NerJson(),
    Nli(),
    Qa(),
    Sft(),
    Slots(),
    Translate(),
)


@runtime_checkable
class LabelTask(Task, Protocol):
    """A task whose answers are labels, which a classification head can give too."""

    def segments(self, row: Any) -> tuple[str, ...]:
        """Return the one or two texts that are classified."""

    def labels(self, rows: Sequence[Any]) -> tuple[str, ...]:
        """Return the classes, in the order of a head's outputs."""


@runtime_checkable
class ComparableTask(Task, Protocol):
    """A task that asks about one text, and whose answers to a text and to its translation can be compared."""

    def unlabelled(self, text: str, language: str) -> Any:
        """Return a row of a text without its answer."""

    def labelled(self, row: Any, answer: str) -> Any:
        """Return a row whose right answer is this one, which a model gave to the row's text or to its translation."""

    def agreement(self, rows: Sequence[Any]) -> tuple[Metric, ...]:
        """Return how answers to translations are scored against the answers of the rows, the headline metric first."""


@runtime_checkable
class JoinableTask(Task, Protocol):
    """A task whose rows can hold their source in another language too (input-level fusion)."""

    def joined(self, row: Any, source: Any) -> Any:
        """Return a row whose texts begin with those of its source."""


@runtime_checkable
class TokenTask(Task, Protocol):
    """A task whose answers are tags of words, which a token classification head can give too."""

    def words(self, row: Any) -> tuple[str, ...]:
        """Return the words that are tagged.

        Raises:
            DataError: the row has none.
        """

    def tags(self, row: Any) -> tuple[str, ...]:
        """Return the right IOB2 tag of each word.

        Raises:
            DataError: the row has no words.
        """

    def tagged(self, row: Any, tags: Sequence[str]) -> str:
        """Return the answer that IOB2 tags of the words stand for."""


@runtime_checkable
class SpanTask(Task, Protocol):
    """A task whose answers are parts of a text, which a question answering head can give too."""

    def asked(self, row: Any) -> tuple[str, str]:
        """Return question and text."""

    def span(self, row: Any) -> tuple[int, int] | None:
        """Return the first character of the right answer in the text and the one after its last, None if none is."""

    def is_astray(self, row: Any) -> bool:
        """Whether the row has answers, and none of them stands in the text."""

    def around(self, row: Any, size: int) -> Any:
        """Return the row with a part of its text: the right answer and about `size` characters around it."""

    def pointed(self, row: Any, span: tuple[int, int] | None) -> str:
        """Return the answer that these characters of the text are, or that there is none."""


_NOTHING = (format_entities([]), NO_SLOTS, UNANSWERABLE)
"""Answers that say that there is nothing to find."""


def clusters_of(task: Task, rows: Sequence[Any]) -> list[str] | None:
    """Return the cluster of each row, such as the text that several questions are about; None where each is one.

    Rows of one cluster are easy or hard together, so intervals resample them together. A row says its cluster itself
    (`row.cluster`, from a column of the data), or its task does (`task.cluster(row)`).
    """
    by_task = getattr(task, "cluster", None)
    named = [
        getattr(row, "cluster", "") or (by_task(row) if by_task else "") or f"row {number}"
        for number, row in enumerate(rows)
    ]
    # the same text in two languages is two clusters: resamples are drawn within a language
    return (
        named if len({(task.language(row), name) for row, name in zip(rows, named, strict=True)}) < len(rows) else None
    )


TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def remarks(task: Task, rows: Sequence[Any]) -> list[str]:
    """Return what a reader of scores on these rows should know.

    A language may have one answer for all its rows; a model that always gives it has them all right.
    """
    own = task.remarks(rows) if isinstance(task, Translate) else []
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        answers.setdefault(task.language(row), Counter())[task.answer(row)] += 1
    return own + [
        f"warning: all {found.total()} rows of '{language}' have the answer {next(iter(found))[:40]!r}: a model that "
        "gives no other one scores perfectly there."
        for language, found in answers.items()
        if len(found) == 1 and (found.total() > 1 or next(iter(found)) in _NOTHING)
    ]


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in TASKS:
        raise UsageError(f"--task must be one of {', '.join(sorted(TASKS))}, got {name!r}.")
    return TASKS[name]


def require_comparable(task: Task) -> ComparableTask:
    """Return a task whose answers to a text and to its translation can be compared.

    Raises:
        UsageError: they cannot be, or the task asks about more than one text.
    """
    if not isinstance(task, ComparableTask):
        raise UsageError(
            f"--pairs need a task that asks about one text and whose answers are alike in all languages (classify, "
            f"slots, ner-json), and '{task.name}' is not one. Give labelled rows instead."
        )
    return task


def metrics_of(
    task: Task, rows: Sequence[Any], *, metric: str | None = None, scorer: str | None = None
) -> tuple[Metric, ...]:
    """Return how rows are scored, the headline metric first.

    Args:
        task: The task.
        rows: The rows.
        metric: Name of the headline metric; default the task's first.
        scorer: Whose script is followed where tasks of this kind are scored differently; default the task's first.

    Raises:
        UsageError: the task has no such metric or scorer, or the metric can score no row of a language.
    """
    scorers: Sequence[str] = getattr(task, "scorers", ())
    if scorer is not None and scorer not in scorers:
        known = f"one of {', '.join(scorers)}" if scorers else "left out"
        raise UsageError(f"--scorer must be {known} for task '{task.name}', got {scorer!r}.")
    found = task.metrics(rows) if scorer is None else task.metrics(rows, scorer=scorer)  # type: ignore[call-arg]
    named = {each.name: each for each in found}
    if metric is not None and metric not in named:
        raise UsageError(f"--metric must be one of {', '.join(named)} for these rows of {task.name}, got {metric!r}.")
    headline = found[0] if metric is None else named[metric]
    if metric is not None:  # the mean over languages would be one over the others
        scored = {task.language(row) for row in rows if headline.count(row, task.answer(row)) is not None}
        if lost := sorted({task.language(row) for row in rows} - scored):
            raise UsageError(
                f"--metric {metric} needs annotated tokens in every language, and {', '.join(lost)} has none. "
                f"Leave out these languages, or choose {' or '.join(name for name in named if name != metric)}."
            )
    return (headline, *(each for each in found if each is not headline))


def get_template(task: Task, name: str | None = None) -> Template:
    """Return a task's prompt template by name; default its first.

    Raises:
        UsageError: there is none of this name.
    """
    if name is None:
        return next(iter(task.templates.values()))
    if name not in task.templates:
        raise UsageError(f"--template must be one of {', '.join(task.templates)} for {task.name}, got {name!r}.")
    return task.templates[name]
