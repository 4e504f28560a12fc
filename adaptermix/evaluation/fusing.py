"""Sources for the passes of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..adapters import AdapterSource
from ..fusion.bank import SourceBank
from ..fusion.rows import encode_sources
from ..fusion.sources import Fuser
from ..models import BaseModel
from ..progress import Watcher
from ..tasks import Task
from .answering import Answering
from .heads import LONGEST


@contextmanager
def fusing(
    base: BaseModel,
    systems: Sequence[AdapterSource],
    answering: Answering,
    *,
    task: Task,
    template: str,
    beside: Sequence[Any] | None,
    watch: Watcher,
) -> Iterator[None]:
    """Let passes fuse with the sources of their rows where the adapter that acts does.

    Args:
        base: The model with the adapter in it.
        systems: What acts.
        answering: The rows that are answered.
        task: The task.
        template: Name of the prompt template.
        beside: Source of each row, if there are any; a fused adapter is a plain LoRA without.
        watch: Is told where sources are missing.
    """
    settings = next((system.meta.fusion for system in systems if system.meta.fusion), None)
    if settings is None or beside is None:
        if settings is not None:
            watch.note(
                "warning: a fused adapter is a plain LoRA without sources: give the rows' sources with --source."
            )
        yield
        return
    encoded = encode_sources(base, task, template, beside, LONGEST)
    bank, fuser = SourceBank(base, encoded, answering.prompts(), settings), Fuser(base.model)
    answering.before = lambda rows: fuser.use(bank.of(rows))
    try:
        yield
    finally:
        answering.before = lambda _rows: None
        fuser.close()
