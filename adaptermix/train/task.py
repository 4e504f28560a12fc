"""`train-task`: a task LoRA on a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import BaseModel, load_base, require_causal
from ..progress import SILENT, Watcher
from ..settings import TaskSettings
from ..tasks import Task, Template, get_task, get_template
from .objectives import answer_loss
from .objectives.task_ce import IGNORED
from .run import TrainReport, check_before, dry_report, train
from .sampler import Sampler
from .trainer import Trainer, count_steps

Example = tuple[list[int], list[int]]
"""Token ids of the prompt and of the answer."""


def encode_rows(task: Task, template: Template, rows: Sequence[Any], tokenizer: Any, max_length: int) -> list[Example]:
    """Return prompt and answer ids per row; too long a row loses the prompt's beginning, then the answer's end."""
    examples = []
    for row in rows:
        answer = template.encode_answer(task.answer(row), tokenizer)[:max_length]
        prompt = template.encode(task.fields(row), tokenizer)
        room = max(1, max_length - len(answer))
        examples.append((prompt[-room:], answer))
    return examples


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels, padded on the right.

    Shapes: each [rows longest].
    """
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids, mask, labels = [], [], []
    for prompt, answer in examples:
        spare = width - len(prompt) - len(answer)
        ids.append([*prompt, *answer, *[pad] * spare])
        mask.append([1] * (width - spare) + [0] * spare)
        labels.append([IGNORED] * len(prompt) + answer + [IGNORED] * spare)
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.tensor(rows, device=device) for name, rows in zip(names, (ids, mask, labels), strict=True)}


class TaskLoss:
    """Loss of a batch of examples, by batch number.

    Args:
        base: The base model with its LoRA in.
        examples: Encoded rows.
        settings: The run's settings.
    """

    def __init__(self, base: BaseModel, examples: Sequence[Example], settings: TaskSettings) -> None:
        self._base, self._examples = base, examples
        self._sampler = Sampler(groups=[range(len(examples))], batch_size=settings.batch_size, seed=settings.seed)
        base.model.train()

    def of_rows(self, rows: Sequence[int]) -> tuple[Tensor, int]:
        """Return the loss of these rows and their count of tokens."""
        batch = collate([self._examples[row] for row in rows], self._base.tokenizer.pad_token_id, self._base.device)
        return answer_loss(self._base.model, **batch), int(batch["attention_mask"].sum())

    def __call__(self, number: int) -> tuple[Tensor, int]:
        """Return the loss of batch `number` and its count of tokens."""
        return self.of_rows(self._sampler.batch(number))


class DevLoss:
    """Logs the dev loss after each epoch; it decides nothing.

    Args:
        base: The base model with its LoRA in.
        examples: Encoded dev rows.
        settings: The run's settings.
        every: Optimizer steps in an epoch.
    """

    def __init__(self, base: BaseModel, examples: Sequence[Example], settings: TaskSettings, every: int) -> None:
        self._base, self._every, self._size = base, every, settings.batch_size
        self._loss = TaskLoss(base, examples, settings)
        self._rows = range(len(examples))

    def __call__(self, trainer: Trainer) -> None:
        """Measure if an epoch has just ended."""
        if trainer.done % self._every:
            return
        self._base.model.eval()
        with torch.no_grad():
            parts = [self._rows[i : i + self._size] for i in range(0, len(self._rows), self._size)]
            losses = [float(self._loss.of_rows(part)[0]) * len(part) for part in parts]
        self._base.model.train()
        trainer.history.append({"step": trainer.done, "dev_loss": sum(losses) / len(self._rows)})


def train_task(settings: TaskSettings, *, watch: Watcher = SILENT) -> TrainReport:
    """Train a task LoRA by next-token prediction of the answers.

    Raises:
        AdapterMixError: the model, a data file, a setting or the output does not do.
    """
    check_before(settings)
    task = get_task(settings.task)
    template = get_template(task, settings.template)
    rows, files = task.read(settings.train, rows=settings.rows)
    dev_rows, dev_files = task.read(settings.dev, rows=None) if settings.dev else ([], [])
    steps = count_steps(len(rows), settings)
    if settings.dry_run:
        return dry_report(settings, steps)
    base = load_base(settings.base, device=settings.device, dtype=settings.dtype)
    require_causal(base, f"task '{task.name}'")
    examples, dev = (
        encode_rows(task, template, part, base.tokenizer, settings.max_length) for part in (rows, dev_rows)
    )
    every = max(1, round(len(rows) / (settings.batch_size * settings.accumulate)))
    return train(
        base,
        settings,
        lambda: TaskLoss(base, examples, settings),
        steps=steps,
        kind="train-task",
        entries={
            "languages": {"supervised": sorted({task.language(row) for row in rows})},
            "task": {"name": task.name, "template": template.name},
            "data": [file.entry() for file in files],
            "dev": [file.entry() for file in dev_files] or None,
        },
        layers=None,
        watch=watch,
        after_step=DevLoss(base, dev, settings, every) if dev else None,
    )
