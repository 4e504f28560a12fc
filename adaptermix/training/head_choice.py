"""Which head gives the answers of a training run."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters import AdapterSource
from ..errors import DataError, PlanError
from ..models.base import model_kind, require_causal
from ..models.head_forms import Head, Reader
from ..options import JointSettings, TaskSettings
from ..tasks import Task
from ..tasks.data.tables import Row
from ..tasks.heads import HEADS, HeadKind, suiting
from ..tasks.heads.from_adapters import head_of


def choose_head(
    task: Task,
    settings: TaskSettings | JointSettings,
    *,
    start: AdapterSource | None,
    train: Sequence[Row],
    dev: Sequence[Row],
) -> Head | None:
    """Return the head that gives the answers; None if they are generated.

    Args:
        task: The task.
        settings: The run's settings.
        start: Adapter that training starts from, if any.
        train: Training rows.
        dev: Dev rows.

    Raises:
        DataError: a row lacks what the head reads; no dev row has a label of the training rows.
        ModelError: no such model, or one that cannot generate the answers.
        PlanError: a head that does not suit the task or the adapter to start from; a setting of a head without one.
    """
    rows = [*train, *dev]
    existing = head_of(task, [start], rows, base=settings.base) if start else None
    kind = HEADS[existing.form.name] if existing and settings.head == "auto" else _head_kind(task, settings)
    reader = reader_of(settings)
    if existing and reader and reader != existing.reader:
        raise PlanError(
            f"training starts from an adapter whose head reads {_reads(existing.reader)}: drop the options of the "
            f"head, which say {_reads(reader)}.",
            code="start-from.head-option",
        )
    if existing and (kind is None or kind.form is not existing.form):
        raise PlanError(
            f"training starts from an adapter with {existing.form.title}: drop --head {settings.head}.",
            code="start-from.head-option",
        )
    if kind is None:
        if settings.head_learning_rate:
            raise PlanError(
                "--head-learning-rate needs a head, and the answer is generated: add --head or drop it.",
                code="train.head-learning-rate",
            )
        if reader:
            raise PlanError(
                "--head-layers and --head-pooling need a head, and the answer is generated: add --head or drop them.",
                code="head.reader-option",
            )
        require_causal(settings.base, f"without a head for it (--head), task '{task.name}'")
        return None
    if settings.template:
        raise PlanError(
            "a head reads no prompt: drop --template, or --head none has the answers generated.",
            code="head.no-template",
        )
    if existing:
        return existing
    labels = kind.labels(task, train)
    in_dev = kind.labels(task, dev)
    new = sorted(set(in_dev) - set(labels))
    if new and kind.closed and len(new) == len(in_dev):
        raise DataError(
            f"dev rows must have labels of the training rows ({', '.join(labels)}), found {new[0]!r}.",
            code="train.dev-labels",
        )
    return Head(form=kind.form, labels=labels, reader=reader)


def _head_kind(task: Task, settings: TaskSettings | JointSettings) -> HeadKind | None:
    if settings.head == "none":
        return None
    if settings.head == "auto":
        return None if model_kind(settings.base) == "causal" else suiting(task)
    kind = HEADS[settings.head]
    if not kind.suits(task):
        raise PlanError(
            f"--head {settings.head} needs {kind.needs}, and '{task.name}' is not one.",
            code="train.head-kind",
        )
    return kind


def reader_of(settings: TaskSettings | JointSettings) -> Reader | None:
    """Return how the head reads hidden states; None for a head of transformers."""
    if settings.head_layers is None and settings.head_pooling is None:
        return None
    return Reader(
        pooling=settings.head_pooling or "auto",
        layers=settings.head_layers or "last",
        aggregate=settings.aggregate,
        gate=settings.gate,
        gate_ratio=settings.gate_ratio,
        norm=settings.head_norm,
    )


def _reads(reader: Reader | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (reader or Reader()).document().items())
