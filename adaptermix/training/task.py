"""`train-task`: a task LoRA, whose answers are generated or given by a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..adapters import AdapterSource
from ..errors import DataError
from ..io.json_types import JsonObject
from ..models.base import BaseModel
from ..models.blocks import keep_blocks
from ..models.head_forms import Head
from ..options import JointSettings, StackSettings, TaskSettings, TrainingSettings
from ..progress import SILENT, Watcher
from ..tasks import Task, Template, get_task, get_template
from ..tasks.data.report import RowsReport, describe
from ..tasks.data.tables import Row
from ..tasks.heads import HEADS, HeadRows
from ..tasks.heads.base import IGNORED, tokens_of
from ..tasks.heads.from_adapters import template_of
from ..tasks.splits import DEV, TRAINING, refuse_tested
from .early_stopping import RowsLoss
from .encoding import Example, Examples, encode_rows
from .head_choice import choose_head
from .losses import answer_loss, plain_head
from .parallel import ALONE, Processes
from .report import TrainReport
from .runner import DataEntries, Objective, run_training
from .sampler import LengthSampler, Sampler
from .sharding import load_for
from .trainer import BatchLoss, Together, in_a_row


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Return input_ids, attention_mask, position_ids and labels, padded on the left.

    Answers then end at the same position, so that the output layer is needed at a few positions only.

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
        # Without a prompt no token comes before the first one, so the model cannot predict it.
        taught = answer if prompt else [IGNORED, *answer[1:]]
        columns["labels"].append([IGNORED] * (spare + len(prompt)) + taught)
    return {name: torch.tensor(rows, device=device) for name, rows in columns.items()}


class Answers:
    """Loss of generated answers, for rows by their numbers.

    Args:
        base: The base model with its LoRA in.
        examples: Encoded rows.

    Attributes:
        prompts: For each row, the number of tokens of the prompt of each pass; here there is one pass.
        taught: Numbers of the rows to learn from.

    Raises:
        DataError: there are no rows to learn from.
    """

    def __init__(self, base: BaseModel, examples: Examples) -> None:
        if not examples.taught:
            notes = " ".join(examples.notes)
            raise DataError(
                f"no row is left to learn from: {notes} Give a larger --max-length, or other rows.",
                code="train.no-rows",
            )
        self._base, self._examples = base, examples
        self.prompts = [[len(prompt)] for prompt, _ in examples]
        self._head = plain_head(base.model)
        self.lengths = [len(prompt) + len(answer) for prompt, answer in examples]
        self.taught = examples.taught

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        batch = collate([self._examples[row] for row in rows], self._base.tokenizer.pad_token_id, self._base.device)
        loss = answer_loss(self._base.model, **batch, head=self._head)
        return BatchLoss(loss, sum(self.lengths[row] for row in rows), terms=self.terms(rows))

    def terms(self, rows: Sequence[int]) -> int:
        examples = (self._examples[row] for row in rows)
        return sum(len(answer) - (not prompt) for prompt, answer in examples if answer)


class OfHead:
    """Loss of a head's answers, for rows by their numbers.

    Args:
        rows: Encoded rows.

    Attributes:
        prompts: For each row, the number of tokens of each text.
        taught: Numbers of the rows to learn from: those with a class, word or window that the loss counts.
    """

    def __init__(self, rows: HeadRows) -> None:
        self._rows = rows
        self.lengths = rows.lengths
        self.prompts = tokens_of(rows)
        self.taught = [row for row in range(len(rows.lengths)) if rows.terms([row])]

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        return BatchLoss(self._rows.loss(rows), sum(self.lengths[row] for row in rows), terms=self.terms(rows))

    def terms(self, rows: Sequence[int]) -> int:
        return self._rows.terms(rows)


def loss_of_rows(
    base: BaseModel, task: Task, rows: Sequence[Row], *, template: str, max_length: int, watch: Watcher = SILENT
) -> Answers | OfHead:
    """Return the loss of rows, by their numbers: of the model's head, or of generated answers.

    Args:
        base: The base model; adapters that act on its output layer must be on it already.
        task: The task.
        rows: Its rows.
        template: Name of the prompt template.
        max_length: Most tokens of a row.
        watch: Receives notes on rows that are cut or left out.
    """
    if base.head is None:
        prompts = get_template(task, template)
        examples = encode_rows(
            task, prompts, rows, base.tokenizer, max_length=max_length, mixed=base.mixed, watch=watch
        )
        return Answers(base, examples)
    encoded = HEADS[base.head.form.name].encode(base, task, rows, max_length=max_length, teach=True)
    for note in encoded.notes:
        watch.note(note)
    return OfHead(encoded)


class TaskLoss:
    """Loss of a batch of rows, by batch number: its part of the mean over all terms of the optimizer step.

    A term is a token, word or row that the loss counts. So 8 rows give the same step in one batch, in two of 4 and in
    eight of 1, in one process or several.

    Args:
        of_rows: Loss of rows by their numbers.
        settings: The run's settings.
        processes: Those that share each batch.
        together: Maps a batch number to the batches of its optimizer step; default `accumulate` consecutive ones.
    """

    def __init__(
        self,
        of_rows: RowsLoss,
        settings: TrainingSettings,
        processes: Processes = ALONE,
        *,
        together: Together | None = None,
    ) -> None:
        self._of_rows, self._processes = of_rows, processes
        self._together = together or in_a_row(settings.accumulate)
        self._whole: tuple[Sequence[int], int] = ((), 0)
        sampler = Sampler(groups=[of_rows.taught], batch_size=settings.batch_size, seed=settings.seed)
        by_length = LengthSampler(sampler=sampler, lengths=of_rows.lengths)
        self._sampler = by_length if getattr(settings, "group_by_length", False) else sampler

    def __call__(self, number: int) -> BatchLoss:
        rows = self._sampler.batch(number)
        share = self._processes.share(rows)
        batch = self._of_rows(share)
        part = self._processes.part(self._of_rows.terms(share), rows, self._terms(number))
        return batch._replace(loss=batch.loss * part)

    def _terms(self, number: int) -> int:
        """Return how many terms the optimizer step of batch `number` has; every process computes it alone."""
        batches = self._together(number)
        if batches != self._whole[0]:
            terms = sum(self._of_rows.terms(self._sampler.batch(other)) for other in batches)
            self._whole = (batches, terms)
        return self._whole[1]


class TaskEntries(DataEntries):
    """The manifest's entries on the data of a run, and on its `task`: name, template and head."""

    task: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """Rows of a task, before a model is loaded.

    Args:
        task: The task.
        template: Template of the prompts.
        train: Training rows.
        dev: Dev rows.
        entries: The manifest's entries on the rows.
        report: Counts of the training rows.
        start: Adapter that training starts from, if any.
    """

    task: Task
    template: Template
    train: Sequence[Row]
    dev: Sequence[Row]
    entries: TaskEntries
    report: RowsReport
    start: AdapterSource | None = None

    @classmethod
    def read(
        cls,
        settings: TaskSettings | JointSettings | StackSettings,
        start: AdapterSource | None = None,
        watch: Watcher = SILENT,
    ) -> TaskData:
        """Read the rows.

        Args:
            settings: The run's settings.
            start: Adapter that training starts from; its template of the same task is the default.
            watch: Receives faults of the record of test data.

        Raises:
            AdapterMixError: an unknown task or template, or a data file that is invalid or is test data.
        """
        task = get_task(str(settings.task), settings.columns)
        known = start.meta.manifest.get("task") if start else None
        same = [start] if start and isinstance(known, Mapping) and known.get("name") == task.name else []
        template = get_template(task, template_of(task, same, settings.template))
        rows, files = task.read(settings.train, rows=settings.rows)
        dev_rows, dev_files = task.read(settings.dev, rows=None) if settings.dev else ([], [])
        report = describe(
            [(task.language(row), text_of(task, row)) for row in rows],
            [text_of(task, row) for row in dev_rows],
            left_out=sum(file.left_out for file in files),
        )
        entries: TaskEntries = {
            "languages": {"supervised": sorted({task.language(row) for row in rows})},
            "task": {"name": task.name, "template": template.name},
            "data": [file.entry() for file in files],
            "dev": [file.entry() for file in dev_files] or None,
            "tested": refuse_tested({TRAINING: files, DEV: dev_files}, allowed=settings.allow_tested, watch=watch)
            or None,
            "rows": report.document(),
        }
        return cls(task=task, template=template, train=rows, dev=dev_rows, entries=entries, report=report, start=start)

    def warnings(self) -> list[str]:
        """Return warnings on the rows."""
        notes = self.report.warnings()
        answers = {self.task.answer(row) for row in self.train}
        if len(answers) == 1 and len(self.train) > 1:
            notes.append(
                f"warning: all {len(self.train)} training rows have the answer {answers.pop()[:40]!r}: the adapter "
                "learns to give it to everything."
            )
        return notes

    def head(self, settings: TaskSettings | JointSettings) -> Head | None:
        """Return the head that gives the answers; None if they are generated. See `choose_head`."""
        return choose_head(self.task, settings, start=self.start, train=self.train, dev=self.dev)

    def load(self, settings: TaskSettings | JointSettings, processes: Processes = ALONE) -> BaseModel:
        """Load the base model, with a head if the task is to have one.

        Raises:
            AdapterMixError: see `head`; or the model does not load, or cannot have the head.
        """
        return load_for(settings, processes, head=self.head(settings), seed=settings.seed)

    def objective(
        self, base: BaseModel, rows: Sequence[Row], max_length: int, watch: Watcher = SILENT
    ) -> Answers | OfHead:
        """Return the loss of rows by their numbers; see `loss_of_rows`."""
        return loss_of_rows(base, self.task, rows, template=self.template.name, max_length=max_length, watch=watch)

    def manifest(self, base: BaseModel, rows: RowsLoss) -> TaskEntries:
        """Return the manifest's entries; `rows` are the loss of the training rows."""
        task = self.entries["task"]
        if base.head:
            task = task | {"head": base.head.form.name, "labels": list(base.labels)}
            if base.head.reader:
                task["reader"] = base.head.reader.document()
        fewer = {"taught": len(rows.taught)} if len(rows.taught) < len(self.train) else {}
        return self.entries | {"task": task, "rows": self.entries["rows"] | fewer}


def _best_blocks(logits: Tensor) -> str:
    """Return a note on the lower blocks that a head with `last+search` weighs most; `logits` are [1 + blocks]."""
    weights = logits.softmax(0)[1:].tolist()
    first, second = sorted(range(len(weights)), key=lambda block: -weights[block])[:2]
    return (
        f"--head-layers last+search weighs blocks {first} ({weights[first]:.2f}) and {second} ({weights[second]:.2f}) "
        f"most among the lower ones: compare last+{first}, last+{second} and these blocks alone on dev rows."
    )


def text_of(task: Task, row: Row) -> str:
    """Return the text of a row's fields, to compare it with others."""
    return "\n".join(str(value) for value in task.fields(row).values())


S = TypeVar("S", bound=TrainingSettings)
T = TypeVar("T", bound=TaskSettings | JointSettings)


class RowsObjective(Objective[S]):
    """The right answers of the rows of a task."""

    data: TaskData
    train_rows: RowsLoss
    dev_rows: RowsLoss | None = None

    def notes(self) -> list[str]:
        return self.data.warnings()

    def encode(self) -> None:
        """Encode the rows for the loaded model, and let it train."""
        base, data, settings = self.run.base, self.data, self.run.settings
        self.train_rows = data.objective(base, data.train, settings.max_length, self.run.watch)
        if data.dev:
            self.dev_rows = data.objective(base, data.dev, settings.max_length, self.run.watch)
        base.model.train()

    def rows(self) -> int:
        return len(self.train_rows.taught) if hasattr(self, "train_rows") else len(self.data.train)

    def dev(self) -> dict[str, RowsLoss]:
        return {"dev_loss": self.dev_rows} if self.dev_rows else {}

    def loss(self, together: Together | None = None) -> TaskLoss:
        return TaskLoss(self.train_rows, self.run.settings, self.run.processes, together=together)


class TaskObjective(RowsObjective[T]):
    """A task: its answers are generated, or given by a head."""

    command = "train-task"

    def read(self) -> None:
        self.data = TaskData.read(self.run.settings, self.run.start, self.run.watch)
        self.report = self.data.report

    def check(self) -> None:
        self.data.head(self.run.settings)

    def load(self) -> BaseModel:
        return self.data.load(self.run.settings, self.run.processes)

    def prepare(self) -> None:
        base, settings = self.run.base, self.run.settings
        reader = base.head.reader if base.head else None
        if type(settings) is TaskSettings and reader and reader.stops_early and reader.lower:
            keep_blocks(base.model, reader.lower)  # a LoRA above would learn nothing
            self.layers = reader.lower
        self.encode()

    def entries(self) -> TaskEntries:
        return self.data.manifest(self.run.base, self.train_rows)

    def closing_notes(self, factors: Mapping[str, Tensor]) -> list[str]:
        mixes = [weights for name, weights in factors.items() if name.endswith("reader.modules_to_save.default.mix")]
        return [_best_blocks(weights) for weights in mixes]


def train_task(settings: TaskSettings, *, watch: Watcher = SILENT, callbacks: Sequence[object] = ()) -> TrainReport:
    """Train a task LoRA by next-token prediction of the answers, or with a head.

    Args:
        settings: The run's settings.
        watch: Receives progress.
        callbacks: Objects with methods of transformers' `TrainerCallback`; see `training.callbacks.Callbacks`.

    Raises:
        AdapterMixError: invalid model, data file, setting or output.
    """
    return run_training(TaskObjective[TaskSettings], settings, watch=watch, callbacks=callbacks)
