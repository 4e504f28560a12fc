"""Source texts of a task's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..adapters import AdapterSource
from ..errors import DataError, PlanError
from ..models.base import BaseModel
from ..models.positions import readable
from ..progress import Watcher
from ..tasks import JoinableTask, LabelTask, Task, get_template
from ..tasks.data import DataFile
from ..tasks.data.prompt_ids import PromptIds
from ..tasks.data.tables import Row
from ..tasks.heads import HEADS
from ..tasks.heads.base import Features
from .latents import Latents

INPUT = "input"
"""The fusion that puts a source before its text: a plain LoRA for PEFT."""
MISSING = "-"
"""Marks a missing text in a source file."""


def fusion_of(systems: Sequence[AdapterSource]) -> Mapping[str, Any]:
    """Return the fusion settings among some adapters; empty without a fusion."""
    entries = [system.meta.fusion or system.meta.manifest.get("fusion") for system in systems]
    return next((entry for entry in entries if isinstance(entry, Mapping) and entry), {})


def reads_itself(systems: Sequence[AdapterSource]) -> bool:
    """Return whether an adapter uses sources from another encoder, which read the rows themselves in training."""
    entries = [system.meta.manifest.get("fusion") for system in systems if system.meta.fusion.get("fusion_encoder")]
    return any(isinstance(entry, Mapping) and not entry.get("sources") for entry in entries)


def joined(task: Task, rows: Sequence[Row], sources: Sequence[Row]) -> list[Row]:
    """Return rows that include their sources.

    Raises:
        PlanError: the task does not support it.
    """
    if not isinstance(task, JoinableTask):
        raise PlanError(
            f"--fusion {INPUT} is for classify, nli and qa, and the task is {task.name}.", code="fusion.task"
        )
    pairs = zip(rows, sources, strict=True)
    return [row if is_missing(task, source) else task.with_source(row, source) for row, source in pairs]


def encode_latents(latents: Latents, task: Task, rows: Sequence[Row]) -> Sequence[Sequence[Features]]:
    """Return the other encoder's inputs for each row: one text without a prompt; empty for a missing one."""
    there = [row for row in rows if not is_missing(task, row)]
    encoded = iter(latents.encode(list(map(task.texts, there)), [task.language(row) for row in there]))
    return [[] if is_missing(task, row) else [next(encoded)] for row in rows]


def is_missing(task: Task, source: Row) -> bool:
    """Return whether a source row is missing, which means that all its texts are `-`."""
    return {text.strip() for text in task.texts(source)} == {MISSING}


def read_beside(
    task: Task,
    arguments: Sequence[str],
    rows: Sequence[Row],
    *,
    data: Sequence[str],
    chosen: str | None,
    watch: Watcher,
) -> tuple[list[Row], list[DataFile]]:
    """Return the source of each row, and the files: row i of the sources is the translation of row i of the data.

    One source file may serve several data files that are translations of it. A row of `-` is a missing source.

    Args:
        task: The task.
        arguments: Source files, in the order of the data files.
        rows: The task's rows.
        data: The arguments of the data files.
        chosen: Rows of each file to use.
        watch: Receives notes about differing answers and missing sources.

    Raises:
        DataError: there is not one source for each row.
    """
    sources, files = task.read(list(arguments), rows=chosen)
    counts = [_counted(task, argument, chosen) for argument in data]
    for file in [*files, *(file for _, of_data in counts for file in of_data)]:
        if file.left_out:
            raise DataError(
                f"rows with sources must all be labelled to stay aligned: {file.left_out} of {file.path} are left out. "
                "Remove them from both files, or label them.",
                code="fusion.unlabelled-rows",
            )
    times = len(rows) // len(sources) if sources and len(files) == 1 else 1
    alike = len(files) == 1 and all(count % len(sources) == 0 for count, _ in counts)
    if len(sources) * times != len(rows) or not (alike or len(files) > 1):
        raise DataError(
            "there must be a source for each row (row i of one file for row i of the other, or one file for several), "
            f"found {len(sources)} for {len(rows)} rows. Give the files in one order, with the same --rows.",
            code="fusion.source-rows",
        )
    sources = list(sources) * times
    if missing := sum(is_missing(task, source) for source in sources):
        watch.note(f"{missing} of {len(rows)} rows have no source ({MISSING}): the LoRA is a plain one for them.")
    if isinstance(task, LabelTask):
        differing = sum(task.answer(a) != task.answer(b) for a, b in zip(rows, sources, strict=True))
        if differing:
            watch.note(f"warning: {differing} of {len(rows)} sources have another label than their row.")
    return sources, files


def _counted(task: Task, argument: str, chosen: str | None) -> tuple[int, list[DataFile]]:
    rows, files = task.read([argument], rows=chosen)
    return len(rows), files


def encode_sources(
    base: BaseModel, task: Task, template: str, rows: Sequence[Row], max_length: int, *, cut_prompts: bool = True
) -> Sequence[Sequence[Features]]:
    """Return the texts of each source: with a head as for the row itself, else only the prompt.

    The list is empty for a missing source.

    Args:
        base: The model.
        task: The task.
        template: Name of the prompt template.
        rows: The sources' rows.
        max_length: Most tokens of a text, as for the targets, so that windows of both match.
        cut_prompts: Whether prompts are truncated like those of training rows; otherwise only to the model's positions.

    Raises:
        DataError: a row lacks a field that the model's head reads.
    """
    there = [row for row in rows if not is_missing(task, row)]
    encoded: Iterator[Sequence[Features]]
    if base.head:
        encoded = iter(HEADS[base.head.form.name].encode(base, task, there, max_length=max_length).texts)
    else:
        chosen = get_template(task, template)
        ids = PromptIds(tokenizer=base.tokenizer, mixed=base.mixed)
        prompts = [ids.encode(chosen, task.fields(row), task.language(row)) for row in there]
        rooms = [max_length if cut_prompts else readable(base.model, len(prompt)) for prompt in prompts]
        encoded = ([{"input_ids": ids.shortened(prompt, room)}] for prompt, room in zip(prompts, rooms, strict=True))
    return [[] if is_missing(task, row) else next(encoded) for row in rows]
