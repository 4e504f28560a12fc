"""What a task is, the defaults that most tasks share, and the registry of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Generic, Protocol, cast, runtime_checkable

from typing_extensions import TypeVar

from ..errors import UsageError
from ..io.json_types import JsonValue
from ..io.registry import Registry
from ..options import registries
from ..options.existing import require_task
from .data.columns import find_rows
from .data.files import DataFile
from .data.tables import Recognisable, Row, pick_rows
from .metrics import Metric
from .prompts import Template

R = TypeVar("R", bound=Recognisable, default=Any)
"""Rows of a task; where only the name of the task is known, they may be any."""


class Task(Protocol[R]):
    """Rows in, prompts and answers out; generated answers in, statistics out.

    A task may also have `scorers` (names of alternative scoring scripts, which `metrics` then takes as `scorer`),
    `cluster(row)` (name of the rows that are resampled together), `remarks(rows)` (sentences for readers of its scores)
    and `no_answer` (the answer where a text contains no part to find).
    """

    @property
    def name(self) -> str:
        """Name in the registry."""

    @property
    def templates(self) -> Mapping[str, Template]:
        """Prompt templates by name; the first is the default."""

    @property
    def one_line(self) -> bool:
        """Whether a line break ends an answer."""

    @property
    def is_open(self) -> bool:
        """Whether an answer may be trained on without its end."""

    def read(self, arguments: Sequence[str], *, rows: str | None = None) -> tuple[Sequence[R], list[DataFile]]:
        """Read rows from `FILE` arguments.

        Args:
            arguments: Paths, globs, `LANGUAGE=FILE` or data sets of the Hub.
            rows: `START:STOP[:STEP]` of the rows of each file.

        Returns:
            The rows in file order, and the files. Rows without an answer are left out; they count as rows.

        Raises:
            DataError: a file is missing, empty or malformed, or its language is unknown.
        """

    def fields(self, row: R) -> Mapping[str, object]:
        """Return the values of the templates' placeholders, and of fields that templates use by name."""

    def texts(self, row: R) -> tuple[str, ...]:
        """Return the texts that a row is about, without any prompt; for sft the turns as one text."""

    def answer(self, row: R) -> str:
        """Return the right answer, which training teaches."""

    def evidence(self, row: R) -> tuple[str, ...]:
        """Return parts of the row's text that the answer depends on, so that a prompt must not lose them."""

    def language(self, row: R) -> str:
        """Return the row's language; for translation the pair, such as `de-en`."""

    def metrics(self, rows: Sequence[R]) -> tuple[Metric, ...]:
        """Return how these rows are scored, the headline metric first."""


B = TypeVar("B", bound=Row)


class BaseTask(ABC, Generic[B]):
    """Defaults that most tasks share.

    A subclass has `name`, `templates`, `rows_of`, `fields`, `answer` and `metrics`, and the decorator `@task`.
    """

    name: str
    templates: Mapping[str, Template]
    one_line = True
    is_open = False
    no_answer: str | None = None
    text_field: str | None = None
    """JSONL field of a row's only text; None if a row has several texts."""
    named_columns: Mapping[str, str] = {}
    """The column of each field whose name differs in the data; see `get_task`."""
    blank: Mapping[str, JsonValue] | None = None
    """Fields of JSONL that stand for the answer in a row without an answer; None if rows need one."""

    def files(self, arguments: Sequence[str]) -> list[DataFile]:
        """Return the files of `FILE` arguments."""
        return find_rows(arguments, self.name, self.named_columns)

    @abstractmethod
    def rows_of(self, file: DataFile) -> Iterable[B | None]:
        """Yield the rows of a file; None for a row that counts as a row and is left out."""

    def read(self, arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[B], list[DataFile]]:
        return pick_rows(self.files(arguments), rows, self.rows_of)

    def texts(self, row: B) -> tuple[str, ...]:
        return row.texts

    def evidence(self, row: B) -> tuple[str, ...]:
        return ()

    def language(self, row: B) -> str:
        return row.language

    def remarks(self, rows: Sequence[B]) -> list[str]:
        """Return sentences that a reader of scores on these rows should know."""
        return []


@runtime_checkable
class LabelTask(Task[R], Protocol[R]):
    """A task whose answers are labels, which a classification head can give too."""

    def segments(self, row: R) -> tuple[str, ...]:
        """Return the one or two texts that are classified."""

    def labels(self, rows: Sequence[R]) -> tuple[str, ...]:
        """Return the classes, in the order of a head's outputs."""


@runtime_checkable
class ComparableTask(Task[R], Protocol[R]):
    """A task about one text, whose answers to a text and to its translation can be compared."""

    def unlabelled(self, text: str, language: str) -> R:
        """Return a row of a text without its answer."""

    def labelled(self, row: R, answer: str) -> R:
        """Return the row with an answer that a model gave to the row's text or to its translation as the right one."""

    def agreement(self, rows: Sequence[R]) -> tuple[Metric, ...]:
        """Return how answers to translations are scored against the answers of the rows, the headline metric first."""


@runtime_checkable
class JoinableTask(Task[R], Protocol[R]):
    """A task whose rows can include their source in another language (input-level fusion)."""

    def with_source(self, row: R, source: R) -> R:
        """Return the row with the source's texts before its own."""


@runtime_checkable
class TokenTask(Task[R], Protocol[R]):
    """A task whose answers are tags of words, which a token classification head can give too."""

    def words(self, row: R) -> tuple[str, ...]:
        """Return the words that are tagged.

        Raises:
            DataError: the row has no words.
        """

    def tags(self, row: R) -> tuple[str, ...]:
        """Return the right IOB2 tag of each word.

        Raises:
            DataError: the row has no words.
        """

    def answer_from_tags(self, row: R, tags: Sequence[str]) -> str:
        """Return the answer that IOB2 tags of the words stand for."""


@runtime_checkable
class FullyTaggedTask(TokenTask[R], Protocol[R]):
    """A task in which every word has a tag, and the tags are not IOB2."""

    def head_tags(self, rows: Sequence[R]) -> tuple[str, ...]:
        """Return the tags of these rows, in the order of a head's outputs."""


@runtime_checkable
class SpanTask(Task[R], Protocol[R]):
    """A task whose answers are parts of a text, which a question answering head can give too."""

    def question_and_context(self, row: R) -> tuple[str, str]:
        """Return the question and the text that answers it."""

    def span(self, row: R) -> tuple[int, int] | None:
        """Return start and end of the right answer in the text, in characters; None if no right answer is there."""

    def lacks_its_answer(self, row: R) -> bool:
        """Return whether the row has answers, but the text contains no answer."""

    def excerpt(self, row: R, size: int) -> R:
        """Return the row with a part of its text: the right answer and about `size` characters around it."""

    def answer_at(self, row: R, span: tuple[int, int] | None) -> str:
        """Return the answer at these characters of the text; for None the answer `no_answer`."""


@runtime_checkable
class ChoiceTask(Task[R], Protocol[R]):
    """A task whose answers are chosen from given options by their likelihood under a language model."""

    def options(self, row: R) -> tuple[str, ...]:
        """Return the answers to choose from."""

    def answer_from_scores(self, row: R, scores: Sequence[float], lengths: Sequence[int]) -> str:
        """Return the answer for a score of each option, the logarithm of its likelihood, and its length in characters.

        The text must contain the scores, so that answers that were stored can be scored in another way.
        """


@dataclass(frozen=True, slots=True)
class Marked:
    """A question with its choices as one text.

    Args:
        text: The text.
        spans: Start and end of each choice in the text, in characters; they follow the passage.
        passage: Start and end of the part that loses its end if the text is too long.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    passage: tuple[int, int]


@runtime_checkable
class MarkedTask(ChoiceTask[R], Protocol[R]):
    """A task that shows its choices in one text, in which a head finds each choice by its characters."""

    def marked(self, row: R) -> Marked:
        """Return the text with its choices, in the order of `options`."""


@runtime_checkable
class RankingTask(Task[R], Protocol[R]):
    """A task whose rows are a query with several documents, which a classification head ranks by expected relevance."""

    def candidates(self, row: R) -> tuple[tuple[str, str], ...]:
        """Return the query with each document."""

    def grades(self, row: R) -> tuple[str, ...]:
        """Return the label of each document, a whole number of how relevant it is."""

    def labels(self, rows: Sequence[R]) -> tuple[str, ...]:
        """Return the labels, the least relevant first."""

    def answer_from_relevance(self, row: R, relevance: Sequence[float]) -> str:
        """Return the answer for the expected relevance of each document."""


TASKS: Registry[Task] = registries.TASKS
"""Tasks by name. Entry points of other packages (group `adaptermix.tasks`) load to a task or to its class."""
T = TypeVar("T", bound=Task)


def task(cls: type[T]) -> type[T]:
    """Register a task class under its name (decorator)."""
    made = cls()
    TASKS.add(made.name, made)
    return cls


def get_task(name: str, columns: Mapping[str, str] | None = None) -> Task:
    """Return a task by name, for data whose fields are in the columns of other names that `columns` maps them to.

    Raises:
        UsageError: no task has this name, its package cannot be imported, or it is of another package without such
            columns.
    """
    require_task(name)
    if not columns:
        return TASKS[name]
    if not hasattr(TASKS[name], "named_columns"):
        raise UsageError(f"task '{name}' does not take --columns: rename the columns in the data.", code="task.columns")
    named: Any = copy(TASKS[name])
    named.named_columns = columns
    return cast("Task", named)


def clusters_of(task: Task[R], rows: Sequence[R]) -> list[str] | None:
    """Return the cluster of each row, such as the text that several questions are about; None if each has one row.

    Rows of one cluster are easy or hard together, so intervals resample them together. The cluster comes from the row
    (`row.cluster`, from a column of the data), else from the task (`task.cluster(row)`).
    """
    by_task = getattr(task, "cluster", None)
    named = [
        getattr(row, "cluster", "") or (by_task(row) if by_task else "") or f"row {number}"
        for number, row in enumerate(rows)
    ]
    # The same text in two languages is two clusters, since resamples are drawn within a language.
    distinct = {(task.language(row), name) for row, name in zip(rows, named, strict=True)}
    return named if len(distinct) < len(rows) else None


def remarks(task: Task[R], rows: Sequence[R]) -> list[str]:
    """Return sentences that a reader of scores on these rows should know.

    If all rows of a language have the same answer, a model that always gives it is right everywhere.
    """
    by_task = getattr(task, "remarks", None)
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        answers.setdefault(task.language(row), Counter())[task.answer(row)] += 1
    return [
        *(by_task(rows) if by_task else ()),
        *(
            f"warning: all {counts.total()} rows of '{language}' have the answer {next(iter(counts))[:40]!r}: a model "
            "that gives no other one scores perfectly there."
            for language, counts in answers.items()
            if len(counts) == 1 and (counts.total() > 1 or next(iter(counts)) == getattr(task, "no_answer", None))
        ),
    ]


def require_comparable(task: Task) -> ComparableTask:
    """Return a task whose answers to a text and to its translation can be compared.

    Raises:
        UsageError: they cannot be, or the task asks about more than one text.
    """
    if not isinstance(task, ComparableTask):
        raise UsageError(
            f"--pairs need a task with one text per row and the same answers in all languages (classify, slots, "
            f"ner-json), which '{task.name}' is not. Give labelled rows instead.",
            code="task.not-comparable",
        )
    return task


def metrics_of(
    task: Task[R], rows: Sequence[R], *, metric: str | None = None, scorer: str | None = None
) -> tuple[Metric, ...]:
    """Return how rows are scored, the headline metric first.

    Args:
        task: The task.
        rows: The rows.
        metric: Name of the headline metric; default the task's first.
        scorer: Name of the scoring script to follow; default the task's first.

    Raises:
        UsageError: the task has no such metric or scorer, or the metric can score no row of a language.
    """
    scorers: Sequence[str] = getattr(task, "scorers", ())
    if scorer is not None and scorer not in scorers:
        known = f"one of {', '.join(scorers)}" if scorers else "left out"
        raise UsageError(f"--scorer must be {known} for task '{task.name}', got {scorer!r}.", code="task.scorer")
    metrics = task.metrics(rows) if scorer is None else task.metrics(rows, scorer=scorer)  # type: ignore[call-arg]
    by_name = {each.name: each for each in metrics}
    if metric is not None and metric not in by_name:
        raise UsageError(
            f"--metric must be one of {', '.join(by_name)} for these rows of {task.name}, got {metric!r}.",
            code="task.metric",
        )
    headline = metrics[0] if metric is None else by_name[metric]
    if metric is not None:  # otherwise the mean over languages would leave out the languages without a score
        scored = {task.language(row) for row in rows if headline.count(row, task.answer(row)) is not None}
        if lost := sorted({task.language(row) for row in rows} - scored):
            raise UsageError(
                f"--metric {metric} needs annotated tokens in every language, but {', '.join(lost)} has no such. "
                f"Leave out these languages, or choose {' or '.join(name for name in by_name if name != metric)}.",
                code="task.metric-language",
            )
    return (headline, *(each for each in metrics if each is not headline))


def get_template(task: Task, name: str | None = None) -> Template:
    """Return a task's prompt template by name; default its first.

    Raises:
        UsageError: the task has no template of this name.
    """
    if name is None:
        return next(iter(task.templates.values()))
    if name not in task.templates:
        raise UsageError(
            f"--template must be one of {', '.join(task.templates)} for {task.name}, got {name!r}.",
            code="task.template",
        )
    return task.templates[name]
