"""Source texts beside a task's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters import AdapterSource
from ..data import DataFile
from ..errors import DataError, PlanError
from ..heads import HEADS
from ..heads.base import Features
from ..models import BaseModel
from ..progress import Watcher
from ..tasks import JoinableTask, LabelTask, Task, TokenTask, get_template
from .latents import Latents

INPUT = "input"
"""The fusion that puts a source before its text: a plain LoRA, as PEFT sees it."""


def fusion_of(systems: Sequence[AdapterSource]) -> Mapping[str, Any]:
    """Return the settings of the fusion that one of some adapters has, empty if none has one."""
    entries = [system.meta.fusion or system.meta.manifest.get("fusion") for system in systems]
    return next((entry for entry in entries if isinstance(entry, Mapping) and entry), {})


def joined(task: Task, rows: Sequence[Any], sources: Sequence[Any]) -> list[Any]:
    """Return rows that hold their sources too.

    Raises:
        PlanError: rows of this task cannot.
    """
    if not isinstance(task, JoinableTask):
        raise PlanError(f"--fusion {INPUT} is for classify, nli and qa, and the task is {task.name}.")
    return [task.joined(row, source) for row, source in zip(rows, sources, strict=True)]


def encode_latents(latents: Latents, task: Task, rows: Sequence[Any]) -> Sequence[Sequence[Features]]:
    """Return what another encoder reads of each row: one text, without any prompt."""
    texts: list[tuple[str, ...]]
    if isinstance(task, LabelTask):
        texts = [task.segments(row) for row in rows]
    elif isinstance(task, TokenTask):
        texts = [(" ".join(task.words(row)),) for row in rows]
    else:
        texts = [("\n".join(map(str, task.fields(row).values())),) for row in rows]
    return [[text] for text in latents.encode(texts, [task.language(row) for row in rows])]


def read_beside(
    task: Task, arguments: Sequence[str], rows: Sequence[Any], chosen: str | None, watch: Watcher
) -> tuple[list[Any], list[DataFile]]:
    """Return the source of each row, and the files: row i of the sources is the translation of row i of the data.

    One source file may stand beside several data files that are translations of it.

    Args:
        task: The task.
        arguments: Source files, in the order of the data files.
        rows: The task's rows.
        chosen: Rows of each file to use.
        watch: Is told where answers differ.

    Raises:
        DataError: there is not a source for each row.
    """
    found, files = task.read(list(arguments), rows=chosen)
    times = len(rows) // len(found) if found and len(files) == 1 else 1
    if not found or len(found) * times != len(rows):
        raise DataError(
            f"there must be a source for each row (row i beside row i, or one file beside several), found {len(found)} "
            f"for {len(rows)} rows. Give the files in one order, with the same --rows."
        )
    sources = list(found) * times
    if isinstance(task, LabelTask):
        differing = sum(task.answer(a) != task.answer(b) for a, b in zip(rows, sources, strict=True))
        if differing:
            watch.note(f"warning: {differing} of {len(rows)} sources have another label than the row beside them.")
    return sources, files


def encode_sources(
    base: BaseModel, task: Task, template: str, rows: Sequence[Any], max_length: int
) -> Sequence[Sequence[Features]]:
    """Return the texts of each source: with a head those that it would read of the row, else the prompt alone.

    Args:
        base: The model.
        task: The task.
        template: Name of the prompt template.
        rows: The sources' rows.
        max_length: Most tokens of a text: that of the targets, so that windows of both are alike.

    Raises:
        DataError: a row lacks what the model's head reads.
    """
    if base.head:
        return HEADS[base.head.form.name].encode(base, task, rows, max_length=max_length).texts
    chosen = get_template(task, template)
    return [[{"input_ids": chosen.encode(task.fields(row), base.tokenizer)[-max_length:]}] for row in rows]
