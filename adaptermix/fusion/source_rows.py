"""Source texts beside a task's rows."""

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
from ..tasks.heads import HEADS
from ..tasks.heads.base import Features
from ..tasks.prompts import shortened
from .latents import Latents

INPUT = "input"
"""The fusion that puts a source before its text: a plain LoRA, as PEFT sees it."""
MISSING = "-"
"""What stands in a source file for a text that is not there."""


def fusion_of(systems: Sequence[AdapterSource]) -> Mapping[str, Any]:
    """Return the settings of the fusion that one of some adapters has, empty if none has one."""
    entries = [system.meta.fusion or system.meta.manifest.get("fusion") for system in systems]
    return next((entry for entry in entries if isinstance(entry, Mapping) and entry), {})


def reads_itself(systems: Sequence[AdapterSource]) -> bool:
    """Return whether an adapter takes sources from another encoder, which in training read the rows themselves."""
    entries = [system.meta.manifest.get("fusion") for system in systems if system.meta.fusion.get("fusion_encoder")]
    return any(isinstance(entry, Mapping) and not entry.get("sources") for entry in entries)


def joined(task: Task, rows: Sequence[Any], sources: Sequence[Any]) -> list[Any]:
    """Return rows that hold their sources too.

    Raises:
        PlanError: rows of this task cannot.
    """
    if not isinstance(task, JoinableTask):
        raise PlanError(f"--fusion {INPUT} is for classify, nli and qa, and the task is {task.name}.")
    pairs = zip(rows, sources, strict=True)
    return [row if is_missing(task, source) else task.with_source(row, source) for row, source in pairs]


def encode_latents(latents: Latents, task: Task, rows: Sequence[Any]) -> Sequence[Sequence[Features]]:
    """Return what another encoder reads of each row: one text, without any prompt; none of one that is missing."""
    there = [row for row in rows if not is_missing(task, row)]
    encoded = iter(latents.encode(list(map(task.texts, there)), [task.language(row) for row in there]))
    return [[] if is_missing(task, row) else [next(encoded)] for row in rows]


def is_missing(task: Task, source: Any) -> bool:
    """Return whether a source row stands for none, as one does whose texts are all `-`."""
    return {text.strip() for text in task.texts(source)} == {MISSING}


def read_beside(
    task: Task,
    arguments: Sequence[str],
    rows: Sequence[Any],
    *,
    data: Sequence[str],
    chosen: str | None,
    watch: Watcher,
) -> tuple[list[Any], list[DataFile]]:
    """Return the source of each row, and the files: row i of the sources is the translation of row i of the data.

    One source file may stand beside several data files that are translations of it. A row of `-` stands for a source
    that is missing.

    Args:
        task: The task.
        arguments: Source files, in the order of the data files.
        rows: The task's rows.
        data: Their files, as they were given.
        chosen: Rows of each file to use.
        watch: Is told where answers differ, and how many sources are missing.

    Raises:
        DataError: there is not a source for each row.
    """
    found, files = task.read(list(arguments), rows=chosen)
    counts = [_counted(task, argument, chosen) for argument in data]
    for file in [*files, *(file for _, of_data in counts for file in of_data)]:
        if file.left_out:
            raise DataError(
                f"rows beside sources must all be labelled, or they would slip: {file.left_out} of {file.path} are "
                "left out. Take them out of both sides, or label them."
            )
    times = len(rows) // len(found) if found and len(files) == 1 else 1
    alike = len(files) == 1 and all(count % len(found) == 0 for count, _ in counts)
    if len(found) * times != len(rows) or not (alike or len(files) > 1):
        raise DataError(
            f"there must be a source for each row (row i beside row i, or one file beside several), found {len(found)} "
            f"for {len(rows)} rows. Give the files in one order, with the same --rows."
        )
    sources = list(found) * times
    if missing := sum(is_missing(task, source) for source in sources):
        watch.note(f"{missing} of {len(rows)} rows have no source ({MISSING}): the LoRA is a plain one there.")
    if isinstance(task, LabelTask):
        differing = sum(task.answer(a) != task.answer(b) for a, b in zip(rows, sources, strict=True))
        if differing:
            watch.note(f"warning: {differing} of {len(rows)} sources have another label than the row beside them.")
    return sources, files


def _counted(task: Task, argument: str, chosen: str | None) -> tuple[int, list[DataFile]]:
    rows, files = task.read([argument], rows=chosen)
    return len(rows), files


def encode_sources(
    base: BaseModel, task: Task, template: str, rows: Sequence[Any], max_length: int, *, cut_prompts: bool = True
) -> Sequence[Sequence[Features]]:
    """Return the texts of each source: with a head those that it would read of the row, else the prompt alone.

    None of a source that is missing.

    Args:
        base: The model.
        task: The task.
        template: Name of the prompt template.
        rows: The sources' rows.
        max_length: Most tokens of a text: that of the targets, so that windows of both are alike.
        cut_prompts: Whether prompts are cut as well, as those of training rows are; else only to the model's positions.

    Raises:
        DataError: a row lacks what the model's head reads.
    """
    there = [row for row in rows if not is_missing(task, row)]
    encoded: Iterator[Sequence[Features]]
    if base.head:
        encoded = iter(HEADS[base.head.form.name].encode(base, task, there, max_length=max_length).texts)
    else:
        chosen = get_template(task, template)
        prompts = (chosen.encode(task.fields(row), base.tokenizer) for row in there)
        special = set(base.tokenizer.all_special_ids)
        cut = (
            shortened(prompt, max_length if cut_prompts else readable(base, len(prompt)), special) for prompt in prompts
        )
        encoded = ([{"input_ids": prompt}] for prompt in cut)
    return [[] if is_missing(task, row) else next(encoded) for row in rows]
