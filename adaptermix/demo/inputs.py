"""The recipe step that provides a demo's base model and data files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import PlanError, code_of
from ..options import DemoInputsSettings
from ..progress import SILENT, Watcher
from .base import demo_base
from .kinds import KINDS


def demo_inputs(settings: DemoInputsSettings, *, watch: Watcher = SILENT) -> dict[str, str]:
    """Write a demo's data into a folder and link its base model there as `base`; running it again changes nothing.

    Raises:
        ModelError: the base model is not available.
        PlanError: more rows are requested than exist.
    """
    out, kind = Path(settings.out), KINDS[settings.task]
    rows = {"train": settings.task_rows, "dev": settings.dev_rows, "test": settings.test_rows, "pairs": settings.pairs}
    sizes = replace(kind.sizes, **{name: count for name, count in rows.items() if count is not None})
    try:
        kind.own_data(out, sizes, seed=settings.seed)
    except ValueError as error:
        raise PlanError(str(error), code=code_of(error, "demo.inputs")) from error
    link = out / "base"
    base = demo_base(kind.model, watch=watch)
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(base.resolve(), target_is_directory=True)
    return {"out": str(out), "base": str(base)}
