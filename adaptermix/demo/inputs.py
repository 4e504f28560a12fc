"""A demo's base model and data files as a step of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import PlanError, code_of
from ..options import DemoInputsSettings
from ..progress import SILENT, Watcher
from .base import demo_base
from .kinds import KINDS
from .plan import Sizes


def demo_inputs(settings: DemoInputsSettings, *, watch: Watcher = SILENT) -> dict[str, Any]:
    """Write a demo's data into a folder and link its base model there as `base`; running it again changes nothing.

    Raises:
        ModelError: the base model is not available.
        PlanError: more rows are requested than exist.
    """
    out, kind = Path(settings.out), KINDS[settings.task]
    value = {
        "train": settings.task_rows,
        "dev": settings.dev_rows,
        "test": settings.test_rows,
        "pairs": settings.pairs,
    }
    sizes = {name: getattr(kind.sizes, name) if rows is None else rows for name, rows in value.items()}
    try:
        kind.own_data(out, Sizes(**sizes), seed=settings.seed)
    except ValueError as error:
        raise PlanError(str(error), code=code_of(error, "demo.inputs")) from error
    link = out / "base"
    base = demo_base(kind.model, watch=watch)
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(base.resolve(), target_is_directory=True)
    return {"out": str(out), "base": str(base)}
