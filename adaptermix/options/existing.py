"""Inputs that must exist. The command line checks them before it imports torch, so that a typo is answered at once."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from ..errors import AdapterFormatError, DataError, UsageError, did_you_mean
from .base import Settings
from .foreign_adapters import refuse_foreign
from .registries import TASKS
from .roles import ADAPTER, Reads, marks_of, values_of

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LANGUAGE = re.compile(r"[a-zA-Z]{2,3}(?:[-_][A-Za-z]{2,4})*=")
_OPENER = re.compile(r"[a-z]+:")


def require_task(name: str) -> None:
    """Refuse an unknown task.

    Raises:
        UsageError: no task has this name.
    """
    if name not in TASKS:
        names = TASKS.names()
        raise UsageError(
            f"--task must be one of {', '.join(names)}, got {name!r}.{did_you_mean(name, names)}", code="task.unknown"
        )


def require_data(pattern: str) -> list[Path]:
    """Return the files of a path or a glob.

    Raises:
        DataError: no file matches.
    """
    paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern)))
    if not paths:
        raise DataError(
            f"a data file must exist, and {pattern!r} matches none. Check the path or the glob.", code="data.not-found"
        )
    return paths


def require_adapter(path: str | Path) -> Path:
    """Return the folder of an adapter.

    Raises:
        AdapterFormatError: there is no such folder, or another tool wrote it; see `refuse_foreign`.
    """
    folder = Path(path)
    refuse_foreign(folder)
    try:
        is_folder = folder.is_dir()
    except OSError:  # a name that is too long
        is_folder = False
    if not is_folder:
        fetch = (
            f" Fetch an adapter of the Hub first: hf download {path} --local-dir FOLDER."
            if _HUB_ID.fullmatch(str(path))
            else ""
        )
        raise AdapterFormatError(
            f"an adapter is a folder with adapter_config.json and adapter_model.safetensors, and {folder} is not a "
            f"folder.{fetch}",
            code="adapter.not-folder",
        )
    return folder


def require_inputs(settings: Settings) -> None:
    """Refuse the first input of a command that does not exist: a task, a data file or an adapter.

    Models and data sets of the Hub are not looked for.

    Raises:
        AdapterMixError: an input does not exist.
    """
    field = type(settings).model_fields.get("task")
    if field and field.annotation in (str, str | None) and (task := getattr(settings, "task", None)):
        require_task(task)
    for option, mark in marks_of(settings, Reads).items():
        values = values_of(settings, [option])
        if mark.is_data:
            for value in values:
                pattern = value if Path(value).exists() else _LANGUAGE.sub("", value, count=1)
                if not _OPENER.match(pattern):
                    require_data(pattern)
        elif mark.use == ADAPTER and not (mark.or_model and getattr(settings, "base", True)):
            for value in values:
                if value != "base":  # the base model alone
                    require_adapter(value)
