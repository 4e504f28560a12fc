"""Where the two models of a stack are: paths in its file that survive a move of the stack with its models."""

from __future__ import annotations

import os
from pathlib import Path

from ..io.fingerprints import fingerprint


def is_local(name: str) -> bool:
    """Return whether the id of a model in a stack's file is a path, and not a Hub id."""
    return name.startswith(("./", "../")) or Path(name).is_absolute()


def stored_id(name: str, folder: Path) -> str:
    """Return the id of a model for a stack's file: a folder is relative to the stack's if they share a parent.

    Args:
        name: Hub id or absolute path.
        folder: The stack's folder, which need not have its final name yet.

    Example:
        >>> stored_id("/home/me/models/e5", Path("/home/me/runs/stack"))
        '../../models/e5'
        >>> stored_id("/models/e5", Path("/home/me/stack")), stored_id("intfloat/e5", Path("/home/me/stack"))
        ('/models/e5', 'intfloat/e5')
    """
    if not is_local(name):
        return name
    target, start = os.path.realpath(name), os.path.realpath(folder)
    if Path(target).anchor != Path(start).anchor or os.path.commonpath([target, start]) == Path(start).anchor:
        return target
    relative = Path(os.path.relpath(target, start)).as_posix()
    return relative if relative.startswith("../") else f"./{relative}"


def found_id(name: str, digest: str | None, folder: Path) -> str:
    """Return where a model of a stack's file is now: a Hub id or an absolute path, which may not exist.

    A folder that is missing is looked for under its name inside the stack's folder and next to it; it is recognised
    by its weights.

    Args:
        name: The id in the file.
        digest: Hash of the model's weight files, if it is known.
        folder: The stack's folder.
    """
    if not is_local(name):
        return name
    path = Path(os.path.normpath(folder.resolve() / name))
    if not path.is_dir() and digest:
        near = (folder.resolve() / path.name, folder.resolve().parent / path.name)
        return str(next((each for each in near if each.is_dir() and fingerprint(each) == digest), path))
    return str(path)
