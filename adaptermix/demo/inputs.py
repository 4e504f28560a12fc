"""The demo's base model and data files as a step of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..progress import SILENT, Watcher
from ..settings import DemoInputsSettings
from .base import demo_base
from .corpus import write

TASK_LANGUAGES = ("en", "fr")
ALIGN_LANGUAGES = ("de", "es", "it", "nl")


def demo_inputs(settings: DemoInputsSettings, *, watch: Watcher = SILENT) -> dict[str, Any]:
    """Write the demo's data into a folder and link its base model there as `base`; running it again changes nothing.

    Raises:
        ModelError: the base model cannot be had.
        PlanError: more rows are asked for than there are.
    """
    out = Path(settings.out)
    try:
        write(
            out,
            train=settings.task_rows,
            dev=settings.dev_rows,
            test=settings.test_rows,
            pairs=settings.pairs,
            task_languages=TASK_LANGUAGES,
            align_languages=ALIGN_LANGUAGES,
            seed=settings.seed,
        )
    except ValueError as error:
        raise PlanError(str(error)) from error
    link = out / "base"
    base = demo_base(watch=watch)
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(base.resolve(), target_is_directory=True)
    return {"out": str(out), "base": str(base)}
