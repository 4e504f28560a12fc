"""The record next to the output of a recipe's step: the settings and inputs of the output, checked by --resume."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ..errors import OutputError
from ..io.files import RECORDED, hidden_path, listed_files, real_path, write_whole
from ..io.json_types import JsonObject
from ..io.launcher import is_main_process
from ..models.base import fingerprint_of
from ..options import Settings
from ..options.paths import digest, paths_of
from ..options.roles import Reads, Role, Writes, marked, marks_of, values_of

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class Identity(TypedDict):
    """What an output was made by, with, and from."""

    command: str
    settings: dict[str, object]
    files: dict[str, list[list[str | None]]]


def read_files(settings: Settings) -> dict[str, list[list[str | None]]]:
    """Return name and content hash of everything that a command reads, by option.

    A path counts by its last part, which results can name, and by its content; a model of the Hub by its files in the
    cache.
    """
    return {
        name: [entry for argument in values_of(settings, [name]) for entry in _read(argument)]
        for name in marks_of(settings, Reads)
        if getattr(settings, name) is not None
    }


def _read(argument: str) -> list[list[str | None]]:
    paths = paths_of(argument)
    if not paths:
        return [[argument, fingerprint_of_id(argument)]]
    prefix = argument.partition("=")[0] if "=" in argument and not os.path.exists(argument) else ""
    return [[f"{prefix}={path.name}" if prefix else path.name, digest(path)] for path in paths]


def fingerprint_of_id(argument: str) -> str | None:
    """Return a hash of the weights in the cache, if an argument is the id of a model of the Hub that is there."""
    return fingerprint_of(argument) if _HUB_ID.fullmatch(argument) else None


def _identity(command: str, settings: Settings) -> Identity:
    without_effect = marked(settings, Role.HANDLING, Role.SCHEDULING, Role.MACHINE)
    apart = {*marks_of(settings, Reads), *marks_of(settings, Writes)}
    values = settings.model_dump(mode="json", exclude=without_effect | apart)
    return {"command": command, "settings": values, "files": read_files(settings)}


def _state(out: Path) -> str | None:
    """Return a hash of an output; of a folder without a list of its files None, since others may write there."""
    if out.is_file() or (out.is_dir() and listed_files(out) is not None):
        return digest(out)
    return None


def _path(out: Path) -> Path:
    return hidden_path(real_path(out), "step")


@dataclass(slots=True)
class StepRecord:
    """What a record keeps besides the identity of a step: the JSON document, which is set when the step is done."""

    document: JsonObject | None = None


@contextmanager
def recorded(command: str, settings: Settings, out: Path) -> Iterator[StepRecord]:
    """Keep a record of a step while it runs, and after it, if there is an output then."""
    record = StepRecord()
    if not is_main_process():
        yield record
        return
    path = _path(out)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = _identity(command, settings)
    _write(path, {**identity, "done": False, "replaces": out.exists(), "output": _state(out)})
    token = RECORDED.set(real_path(out))
    try:
        yield record
        _write(path, {**identity, "done": True, "output": _state(out), "document": record.document})
    finally:
        RECORDED.reset(token)
        if not out.exists():
            path.unlink(missing_ok=True)
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()


def _write(path: Path, record: Mapping[str, object]) -> None:
    write_whole(path, (json.dumps(record, indent=1, sort_keys=True, default=str) + "\n").encode())


def document_of_output(out: Path) -> JsonObject | None:
    """Return the JSON document of the step that made an output; None if an earlier version wrote its record."""
    try:
        document = json.loads(_path(out).read_text(encoding="utf-8")).get("document")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def check_same(command: str, settings: Settings, out: Path) -> bool:
    """Return whether an existing output is the one that the step would make; False if the step was to replace it.

    Raises:
        OutputError: it was made with other settings, from other files, or by something else.
    """
    try:
        if not _path(out).is_file():  # a named pipe would be waited for
            raise FileNotFoundError(_path(out))
        record = json.loads(_path(out).read_text(encoding="utf-8"))
        made: Identity = {
            "command": record["command"],
            "settings": dict(record["settings"]),
            "files": dict(record["files"]),
        }
        differs = _differences(made, command, settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OutputError(
            f"--resume needs outputs that this recipe made, and {out} has no record of that. Remove it, or give "
            "another folder.",
            code="resume.not-of-recipe",
        ) from error
    if differs:
        raise OutputError(
            f"{out} must have the settings of its step to be taken by --resume, and was made with others "
            f"({', '.join(differs[:3])}). Remove it, or give another folder.",
            code="resume.settings",
        )
    now, output = _state(out), record.get("output")
    if not record.get(
        "done"
    ):  # the run ended in this step: before the output was moved to its path, or just after that
        return not record.get("replaces") or (output is not None and output != now)
    if output is not None and output != now:
        raise OutputError(
            f"{out} must be as its step left it to be taken by --resume, and was changed since. Remove it, or give "
            "another folder.",
            code="resume.changed",
        )
    return True


def _differences(record: Identity, command: str, settings: Settings) -> list[str]:
    """Return the differences between a record and the present settings and files."""
    now: Identity = json.loads(json.dumps(_identity(command, settings)))
    if record["command"] != now["command"]:
        return [f"command {record['command']}, now {now['command']}"]
    before, after = record["settings"], now["settings"]
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    changed = [f"{name} {before.get(name)!r}, now {after.get(name)!r}" for name in names]
    files, read = record["files"], now["files"]
    return changed + [f"{name}: other files" for name in sorted({*files, *read}) if files.get(name) != read.get(name)]
