"""`train-task`: a task LoRA on a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import BaseModel, load_base, require_causal
from ..progress import SILENT, Watcher
from ..settings import JointSettings, TaskSettings
from ..tasks import Task, Template, get_task, get_template
from .objectives import answer_loss
from .objectives.task_ce import IGNORED
from .run import TrainReport, attach_on, check_before, dry_report, train
from .sampler import LengthSampler, Sampler
from .selection import DevWatch, mean_loss
from .trainer import BatchLoss, count_steps

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


class TaskLoss:
    """Loss of a batch of examples, by batch number.

    Args:
        base: The base model with its LoRA in.
        examples: Encoded rows.
        settings: The run's settings.
    """

    def __init__(self, base: BaseModel, examples: Sequence[Example], settings: TaskSettings | JointSettings) -> None:
        self._base, self._examples = base, examples
        sampler = Sampler(groups=[range(len(examples))], batch_size=settings.batch_size, seed=settings.seed)
        lengths = [len(prompt) + len(answer) for prompt, answer in examples]
        self._sampler = LengthSampler(sampler=sampler, lengths=lengths) if settings.group_by_length else sampler
        base.model.train()

    def of_rows(self, rows: Sequence[int]) -> BatchLoss:
        """Return the loss of these rows and their count of tokens."""
        batch = collate([self._examples[row] for row in rows], self._base.tokenizer.pad_token_id, self._base.device)
        return BatchLoss(answer_loss(self._base.model, **batch), int(batch["attention_mask"].sum()))

    def __call__(self, number: int) -> BatchLoss:
        """Return the loss of batch `number` and its count of tokens."""
        return self.of_rows(self._sampler.batch(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The rows of a run in tokens.

    Args:
        train: To train on.
        dev: To judge by; may be empty.
    """

    train: list[Example]
    dev: list[Example]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """What a task is trained on, before a model is loaded.

    Args:
        task: The task.
        template: How prompts are made.
        train: Training rows.
        dev: Dev rows.
        entries: What the manifest says of them.
    """

    task: Task
    template: Template
    train: Sequence[Any]
    dev: Sequence[Any]
    entries: dict[str, Any]

    @classmethod
    def read(cls, settings: TaskSettings | JointSettings) -> TaskData:
        """Read the rows.

        Raises:
            AdapterMixError: an unknown task or template, or a data file that does not do.
        """
        task = get_task(settings.task)
        template = get_template(task, settings.template)
        rows, files = task.read(settings.train, rows=settings.rows)
        dev_rows, dev_files = task.read(settings.dev, rows=None) if settings.dev else ([], [])
        entries = {
            "languages": {"supervised": sorted({task.language(row) for row in rows})},
            "task": {"name": task.name, "template": template.name},
            "data": [file.entry() for file in files],
            "dev": [file.entry() for file in dev_files] or None,
        }
        return cls(task=task, template=template, train=rows, dev=dev_rows, entries=entries)

    def encode(self, base: BaseModel, max_length: int) -> Encoded:
        """Return the rows in tokens.

        Raises:
            ModelError: the model does not generate.
        """
        require_causal(base, f"task '{self.task.name}'")
        train, dev = (
            encode_rows(self.task, self.template, rows, base.tokenizer, max_length) for rows in (self.train, self.dev)
        )
        return Encoded(train=train, dev=dev)


def train_task(settings: TaskSettings, *, watch: Watcher = SILENT) -> TrainReport:
    """Train a task LoRA by next-token prediction of the answers.

    Raises:
        AdapterMixError: the model, a data file, a setting or the output does not do.
    """
    check_before(settings)
    data = TaskData.read(settings)
    steps = count_steps(len(data.train), settings)
    if settings.dry_run:
        return dry_report(settings, steps)
    base = load_base(settings.base, device=settings.device, dtype=settings.dtype)
    rows = data.encode(base, settings.max_length)
    on = attach_on(base, settings)

    def judged() -> dict[str, float]:
        return {"dev_loss": mean_loss(base, TaskLoss(base, rows.dev, settings).of_rows, len(rows.dev), settings)}

    return train(
        base,
        settings,
        lambda: TaskLoss(base, rows.train, settings),
        steps=steps,
        kind="train-task",
        entries=data.entries,
        layers=None,
        watch=watch,
        on=on,
        after_step=DevWatch(judged, settings, rows=len(rows.train), key="dev_loss") if rows.dev else None,
    )
