"""Stage 2 of a stack: it learns the states that the teacher, a task adapter of the model on top, has of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import open_adapter, write_adapter
from ..errors import PlanError
from ..io.json_types import JsonObject
from ..merging.on_model import acting
from ..models.base import BaseModel, load_base
from ..models.eval_mode import evaluating, train_loras_only
from ..models.head_forms import Head
from ..models.own_heads import ModelWithHead
from ..models.stack import StackForm, stack_folder
from ..options import StackSettings
from ..progress import SILENT, Watcher
from ..tasks import Task, get_task
from ..tasks.data.report import describe
from ..tasks.heads import HEADS, HeadRows
from ..tasks.heads.base import pad
from ..tasks.heads.from_adapters import head_of
from ..tasks.splits import DEV, TRAINING, refuse_tested
from .by_length import vectors_by_length
from .early_stopping import RowsLoss
from .lora import extract, state_of
from .losses.stacking import state_loss
from .runner import Objective
from .sharding import load_for
from .task import TaskLoss, text_of
from .trainer import BatchLoss, Together


def vectors_of(base: BaseModel, rows: HeadRows, numbers: Sequence[int]) -> Tensor:
    """Return the hidden states of rows that a head of this package reads.

    Shapes: [rows width].
    """
    model: ModelWithHead = base.model
    return model.vectors(**pad(base, [rows.texts[number][0] for number in numbers]))


def stored_vectors(base: BaseModel, rows: HeadRows, watch: Watcher = SILENT) -> Tensor:
    """Return the states that a head reads of all rows, without dropout, on the CPU; each row is computed once.

    Shapes: [rows width].
    """
    with torch.no_grad(), evaluating(base.model), watch.track("teacher", len(rows.lengths)) as advance:
        return vectors_by_length(lambda numbers: vectors_of(base, rows, numbers), rows.lengths, advance)


class ToTeacher:
    """Loss of rows by their numbers: distance of the stack's states from stored ones.

    Args:
        base: The stack with its head and LoRA.
        rows: Its rows, encoded.
        targets: States of the teacher, [rows width].
    """

    def __init__(self, base: BaseModel, rows: HeadRows, targets: Tensor) -> None:
        self._base, self._rows, self._targets = base, rows, targets
        self.lengths = rows.lengths
        self.taught = range(len(rows.lengths))

    def terms(self, rows: Sequence[int]) -> int:
        return len(rows)

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        states = vectors_of(self._base, self._rows, rows)
        targets = self._targets[torch.tensor(rows)].to(states.device)
        return BatchLoss(state_loss(states, targets), sum(self.lengths[row] for row in rows), terms=len(rows))


class StackTaskObjective(Objective[StackSettings]):
    """Stage 2: train the stack so that its state of a text approaches that of the teacher."""

    head: Head
    form: StackForm
    task: Task
    of_rows: ToTeacher
    of_dev: ToTeacher | None = None

    def read(self) -> None:
        settings = self.run.settings
        folder = stack_folder(settings.base)
        if folder is None:
            raise PlanError(
                f"--teacher needs a stack in --base, the folder that stage 1 (--encoder) wrote, got {settings.base!r}.",
                code="stack.no-stack",
            )
        self.form = StackForm.read(folder)
        self.task = get_task(str(settings.task), settings.columns)
        self.teacher = self._taught_by = open_adapter(Path(str(settings.teacher)))
        self.train, files = self.task.read(settings.train, rows=settings.rows)
        self.dev_rows, dev_files = self.task.read(settings.dev, rows=None) if settings.dev else ([], [])
        self._check_base()
        head = head_of(self.task, [self._taught_by], [*self.train, *self.dev_rows])
        if head is None or head.reader is None or head.form.name != "classes" or head.reader.pooling == "auto":
            raise PlanError(
                f"--teacher needs a classification head that reads pooled states of the model on top, and "
                f"'{self._taught_by.name}' does not have one: train it with --head classes --head-pooling "
                f"{self.form.pooling}.",
                code="stack.teacher-head",
            )
        self.head = head
        texts = [(self.task.language(row), text_of(self.task, row)) for row in self.train]
        self.report = describe(texts, [text_of(self.task, row) for row in self.dev_rows])
        tested = refuse_tested({TRAINING: files, DEV: dev_files}, allowed=settings.allow_tested, watch=self.run.watch)
        reader = head.reader.document()
        self._entries: dict[str, Any] = {
            "languages": {"supervised": sorted({language for language, _ in texts})},
            "task": {"name": self.task.name, "head": head.form.name, "labels": list(head.labels), "reader": reader},
            "data": [file.entry() for file in files],
            "dev": [file.entry() for file in dev_files] or None,
            "tested": tested or None,
            "rows": self.report.document(),
            "stack": self.form.document(),
        }

    def _check_base(self) -> None:
        trained, top = self._taught_by.meta.base_fingerprint, self.form.base
        if trained and top.fingerprint and trained != top.fingerprint:
            raise PlanError(
                f"the teacher must be an adapter of the model on top of the stack, {top.id!r}, and "
                f"'{self._taught_by.name}' was trained on {self._taught_by.meta.base!r}, whose weight files differ. "
                f"Train it with --base {top.id}.",
                code="stack.teacher-base",
            )

    def inputs(self) -> JsonObject:
        return {"teacher": self._taught_by.digest}

    def notes(self) -> list[str]:
        return self.report.warnings()

    def _targets(self) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's states of training and dev rows."""
        options = self.run.processes.load_options(self.run.settings)
        base = load_base(self.form.base.id, head=self.head, **options)
        with acting(base, [self._taught_by]):
            train, dev = (
                stored_vectors(base, self._encoded(base, rows), self.run.watch) if rows else None
                for rows in (self.train, self.dev_rows)
            )
            return cast(Tensor, train), dev

    def _encoded(self, base: BaseModel, rows: Sequence[Any]) -> HeadRows:
        return HEADS[self.head.form.name].encode(base, self.task, rows, max_length=self.run.settings.max_length)

    def load(self) -> BaseModel:
        self.targets = self._targets()
        return load_for(self.run.settings, self.run.processes, head=self.head, seed=self.run.settings.seed)

    def prepare(self) -> None:
        base = self.run.base
        weights = {key: self._taught_by.load_saved(key) for key in self._taught_by.saved_headers}
        parameters = dict(base.model.named_parameters())
        with torch.no_grad():
            for key, value in weights.items():
                parameters[key.removeprefix("base_model.model.")].copy_(value)
        self.saved, self.saved_modules = weights, base.head_modules
        self.run.base = base = replace(base, head_modules=())  # the head is the teacher's, and frozen
        train, dev = self.targets
        self.of_rows = ToTeacher(base, self._encoded(base, self.train), train)
        if dev is not None:
            self.of_dev = ToTeacher(base, self._encoded(base, self.dev_rows), dev)

    def rows(self) -> int:
        return len(self.train)

    def dev(self) -> dict[str, RowsLoss]:
        return {"dev_loss": self.of_dev} if self.of_dev else {}

    def entries(self) -> dict[str, Any]:
        return self._entries

    def loss(self, together: Together | None = None) -> TaskLoss:
        train_loras_only(self.run.base.model)
        return TaskLoss(self.of_rows, self.run.settings, self.run.processes, together=together)

    def write(self, folder: Path, factors: dict[str, Tensor]) -> None:
        run = self.run
        state = state_of(run.base, extract(factors, run.scales, run.taken), run.names, None)
        state = replace(state, meta=replace(state.meta, saved_modules=self.saved_modules), saved=self.saved)
        write_adapter(folder, state)
