"""`train-task`: a task LoRA, whose answers are generated or given by a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import AdapterSource
from ..data.report import RowsReport, describe
from ..errors import DataError, PlanError
from ..head_forms import Head
from ..heads import HEADS, HeadKind, HeadRows, suiting
from ..heads.base import IGNORED, tokens_of, told_cut
from ..heads.brought import head_of, template_of
from ..models import BaseModel, model_kind, require_causal
from ..progress import SILENT, Watcher
from ..settings import JointSettings, TaskSettings
from ..splits import DEV, TRAINING, refuse_tested
from ..tasks import Task, Template, get_task, get_template
from ..tasks.templates import shortened
from .objectives import answer_loss, plain_head
from .on_top import attach_on
from .parallel import ALONE, Processes, in_processes
from .run import TrainReport, check_before, dry_report, train
from .sampler import LengthSampler, Sampler
from .selection import RowsLoss, watch_rows
from .sharding import load_for
from .starting import fit_start, open_start
from .trainer import BatchLoss, count_steps

Example = tuple[list[int], list[int]]
"""Token ids of the prompt and of the answer."""


def encode_rows(
    task: Task, template: Template, rows: Sequence[Any], tokenizer: Any, *, max_length: int, watch: Watcher = SILENT
) -> list[Example]:
    """Return prompt and answer ids per row; too long a row loses the prompt's beginning, then the answer's end.

    Special tokens that open a prompt stay, such as the start token. Generation does not cut prompts, so rows that are
    cut here are asked whole there.

    Args:
        task: The task.
        template: How prompts are made.
        rows: The rows.
        tokenizer: The base model's tokenizer.
        max_length: Most tokens of a row.
        watch: Told of rows that are cut.
    """
    examples = []
    cut = 0
    special = set(tokenizer.all_special_ids)
    for row in rows:
        whole = template.encode_answer(task.answer(row), tokenizer)
        answer = whole[:max_length]
        prompt = template.encode(task.fields(row), tokenizer)
        room = max(1, max_length - len(answer))
        cut += len(prompt) > room or len(whole) > max_length
        examples.append((shortened(prompt, room, special), answer))
    if cut:
        watch.note(told_cut(cut, len(rows), max_length, "the beginning of their prompts"))
    return examples


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Return input_ids, attention_mask, position_ids and labels, padded on the left.

    Answers then end at the same place, so that the output layer is needed at few places only.

    Shapes: each [rows longest].
    """
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    columns: dict[str, list[list[int]]] = {
        name: [] for name in ("input_ids", "attention_mask", "position_ids", "labels")
    }
    for prompt, answer in examples:
        length = len(prompt) + len(answer)
        spare = width - length
        columns["input_ids"].append([*[pad] * spare, *prompt, *answer])
        columns["attention_mask"].append([0] * spare + [1] * length)
        columns["position_ids"].append([0] * spare + list(range(length)))
        columns["labels"].append([IGNORED] * (spare + len(prompt)) + answer)
    return {name: torch.tensor(rows, device=device) for name, rows in columns.items()}


class Answers:
    """The answers of a task, to be generated.

    Args:
        base: The base model with its LoRA in.
        examples: Encoded rows.

    Attributes:
        prompts: Tokens of each row's prompt, by pass: there is one.
    """

    def __init__(self, base: BaseModel, examples: Sequence[Example]) -> None:
        self._base, self._examples = base, examples
        self.prompts = [[len(prompt)] for prompt, _ in examples]
        self._head = plain_head(base.model)
        self.lengths = [len(prompt) + len(answer) for prompt, answer in examples]

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the loss of these rows and their count of tokens."""
        batch = collate([self._examples[row] for row in rows], self._base.tokenizer.pad_token_id, self._base.device)
        loss = answer_loss(self._base.model, **batch, head=self._head)
        terms = int((batch["labels"][:, 1:] != IGNORED).sum())
        return BatchLoss(loss, sum(self.lengths[row] for row in rows), terms=terms)


class OfHead:
    """The answers of a task, to be given by a head.

    Args:
        rows: Encoded rows.

    Attributes:
        prompts: Tokens of each row's texts.
    """

    def __init__(self, rows: HeadRows) -> None:
        self._rows = rows
        self.lengths = rows.lengths
        self.prompts = tokens_of(rows)

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the head's loss of these rows and their count of tokens."""
        return BatchLoss(self._rows.loss(rows), sum(self.lengths[row] for row in rows), terms=self._rows.terms(rows))


class TaskLoss:
    """Loss of a batch of rows, by batch number.

    Args:
        of_rows: Loss of rows by their numbers.
        settings: The run's settings.
        processes: Those that share each batch.
    """

    def __init__(self, of_rows: RowsLoss, settings: TaskSettings | JointSettings, processes: Processes = ALONE) -> None:
        self._of_rows, self._processes = of_rows, processes
        rows = range(len(of_rows.lengths))
        sampler = Sampler(groups=[rows], batch_size=settings.batch_size, seed=settings.seed)
        by_length = LengthSampler(sampler=sampler, lengths=of_rows.lengths)
        self._sampler = by_length if settings.group_by_length else sampler

    def __call__(self, number: int) -> BatchLoss:
        """Return the loss of batch `number` and its count of tokens; of several processes, this one's part."""
        found = self._of_rows(self._processes.share(self._sampler.batch(number)))
        return found._replace(loss=self._processes.weigh(found.loss, found.terms))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """What a task is trained on, before a model is loaded.

    Args:
        task: The task.
        template: How prompts are made.
        train: Training rows.
        dev: Dev rows.
        entries: What the manifest says of them.
        report: Counts of the training rows.
        start: Adapter that training begins from, if it does.
    """

    task: Task
    template: Template
    train: Sequence[Any]
    dev: Sequence[Any]
    entries: dict[str, Any]
    report: RowsReport
    start: AdapterSource | None = None

    @classmethod
    def read(
        cls, settings: TaskSettings | JointSettings, start: AdapterSource | None = None, watch: Watcher = SILENT
    ) -> TaskData:
        """Read the rows.

        Args:
            settings: The run's settings.
            start: Adapter that training begins from; its template of the same task is taken unless one is given.
            watch: Receives what cannot be read of the record of test data.

        Raises:
            AdapterMixError: an unknown task or template, or a data file that does not do or is test data.
        """
        task = get_task(settings.task)
        known = start.meta.manifest.get("task") if start else None
        same = [start] if start and isinstance(known, Mapping) and known.get("name") == task.name else []
        template = get_template(task, template_of(task, same, settings.template))
        rows, files = task.read(settings.train, rows=settings.rows)
        dev_rows, dev_files = task.read(settings.dev, rows=None) if settings.dev else ([], [])
        entries = {
            "languages": {"supervised": sorted({task.language(row) for row in rows})},
            "task": {"name": task.name, "template": template.name},
            "data": [file.entry() for file in files],
            "dev": [file.entry() for file in dev_files] or None,
            "tested": refuse_tested({TRAINING: files, DEV: dev_files}, allowed=settings.allow_tested, watch=watch)
            or None,
        }
        report = describe(
            [(task.language(row), text_of(task, row)) for row in rows],
            [text_of(task, row) for row in dev_rows],
            left_out=sum(file.left_out for file in files),
        )
        entries["rows"] = report.document()
        return cls(task=task, template=template, train=rows, dev=dev_rows, entries=entries, report=report, start=start)

    def warnings(self) -> list[str]:
        """Return what a person should know of the rows."""
        found = self.report.warnings()
        answers = {self.task.answer(row) for row in self.train}
        if len(answers) == 1 and len(self.train) > 1:
            found.append(
                f"warning: all {len(self.train)} training rows have the answer {answers.pop()[:40]!r}: the adapter "
                "learns to give it to everything."
            )
        return found

    def head(self, settings: TaskSettings | JointSettings) -> Head | None:
        """Return the head that is to give the answers, None where they are generated.

        Raises:
            DataError: a row lacks what the head reads; a dev row has a label that no training row has.
            ModelError: no such model, or one that does not generate where it must.
            PlanError: a head that does not suit the task, or that of the adapter training begins from; a setting of one
                where there is none.
        """
        rows = [*self.train, *self.dev]
        brought = head_of(self.task, [self.start], rows) if self.start else None
        kind = HEADS[brought.form.name] if brought and settings.head == "auto" else self._head_kind(settings)
        if brought and (kind is None or kind.form is not brought.form):
            raise PlanError(f"training starts from an adapter with {brought.form.title}: drop --head {settings.head}.")
        if kind is None:
            if settings.head_learning_rate:
                raise PlanError(
                    "--head-learning-rate needs a head, and the answer is generated: add --head or drop it."
                )
            require_causal(settings.base, f"without a head for it (--head), task '{self.task.name}'")
            return None
        if settings.template:
            raise PlanError("a head reads no prompt: drop --template, or --head none has the answers generated.")
        if brought:
            return brought
        labels = kind.labels(self.task, self.train)
        new = sorted(set(kind.labels(self.task, self.dev)) - set(labels))
        if new and kind.closed:
            raise DataError(f"dev rows must have labels of the training rows ({', '.join(labels)}), found {new[0]!r}.")
        return Head(form=kind.form, labels=labels)

    def load(self, settings: TaskSettings | JointSettings, processes: Processes = ALONE) -> BaseModel:
        """Load the base model, with a head if the task is to have one.

        Raises:
            AdapterMixError: see `head`; or the model does not load, or cannot have the head.
        """
        return load_for(settings, processes, head=self.head(settings), seed=settings.seed)

    def _head_kind(self, settings: TaskSettings | JointSettings) -> HeadKind | None:
        if settings.head == "none":
            return None
        if settings.head == "auto":
            return None if model_kind(settings.base) == "causal" else suiting(self.task)
        kind = HEADS[settings.head]
        if not kind.suits(self.task):
            raise PlanError(f"--head {settings.head} needs {kind.needs}, and {self.task.name} has none.")
        return kind

    def objective(
        self, base: BaseModel, rows: Sequence[Any], max_length: int, watch: Watcher = SILENT
    ) -> Answers | OfHead:
        """Return the loss of rows by their numbers.

        Raises:
            DataError: a head can learn from none of them.
        """
        if base.head is None:
            examples = encode_rows(self.task, self.template, rows, base.tokenizer, max_length=max_length, watch=watch)
            return Answers(base, examples)
        encoded = HEADS[base.head.form.name].encode(base, self.task, rows, max_length=max_length, teach=True)
        for note in encoded.notes:
            watch.note(note)
        return OfHead(encoded)

    def manifest(self, base: BaseModel) -> dict[str, Any]:
        """Return the manifest's entries."""
        task = self.entries["task"]
        if base.head:
            task = task | {"head": base.head.form.name, "labels": list(base.labels)}
        return self.entries | {"task": task}


def text_of(task: Task, row: Any) -> str:
    """Return what a row asks, to compare it with others."""
    return "\n".join(str(value) for value in task.fields(row).values())


def train_task(settings: TaskSettings, *, watch: Watcher = SILENT) -> TrainReport:
    """Train a task LoRA by next-token prediction of the answers, or with a head.

    Raises:
        AdapterMixError: the model, a data file, a setting or the output does not do.
    """
    return in_processes(_train_task, settings, watch)


def _train_task(settings: TaskSettings, watch: Watcher, processes: Processes) -> TrainReport:
    check_before(settings)
    settings, start = open_start(settings)
    data = TaskData.read(settings, start, watch)
    steps = count_steps(len(data.train), settings)
    if settings.dry_run:
        data.head(settings)
        return dry_report(settings, steps, rows=data.report, start=start)
    for note in data.warnings():
        watch.note(note)
    base = data.load(settings, processes)
    start = start and fit_start(base.model, start, settings, fingerprint=base.fingerprint)
    on = attach_on(base.model, settings, headed=base.head is not None)
    rows = data.objective(base, data.train, settings.max_length, watch)
    dev = data.objective(base, data.dev, settings.max_length, watch) if data.dev else None
    base.model.train()
    return train(
        base,
        settings,
        lambda: TaskLoss(rows, settings, processes),
        steps=steps,
        kind="train-task",
        entries=data.manifest(base),
        layers=None,
        watch=watch,
        on=on,
        start=start,
        dev=watch_rows(base, settings, dev, steps=steps, rows=len(data.train), processes=processes, watch=watch),
        processes=processes,
    )
