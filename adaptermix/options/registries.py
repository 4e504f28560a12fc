"""Names of what other packages can add to, so that options are checked without importing torch.

The entries themselves are registered by the packages that hold them: `tasks`, `tasks.heads`, `fusion`, `baking` and
`checkpoints`.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ..io.registry import Registry

_SHARED = {"base", "labels", "metrics", "overlap", "prompts", "splits", "tagged", "test_record"}
"""Modules of `tasks` that tasks share. Every other module there is a task of the module's name."""


def _task_names() -> list[str]:
    found = iter_modules([str(Path(__file__).parent.parent / "tasks")])
    return [each.name.replace("_", "-") for each in found if not each.ispkg and each.name not in _SHARED]


TASKS: Registry[Any] = Registry("task", "adaptermix.tasks", own=_task_names(), instances=True)
