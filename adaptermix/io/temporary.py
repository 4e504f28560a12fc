"""Temporary folders that the next run removes if a process was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from .disk import locked

_PREFIX = "adaptermix-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder in the system's folder of temporary files (TMPDIR); it is removed at the end.

    A killed process cannot remove its folder, so each call first removes the folders of this user whose processes have
    ended. A process locks a file next to its folder to show that it is running.

    Raises:
        OSError: the folder cannot be created.
    """
    parent = Path(tempfile.gettempdir())
    _remove_left(parent)
    folder = parent / f"{_PREFIX}{uuid4().hex}"
    with locked(_lock_path(folder)):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_left(parent: Path) -> None:
    """Remove the temporary folders that killed processes of this user left."""
    for lock in parent.glob(f"{_PREFIX}{'[0-9a-f]' * 32}.lock"):
        folder = lock.with_suffix("")
        with suppress(OSError):  # The process is running, or has just removed its folder.
            if _is_own(lock):
                with locked(lock, needs_locks=True):
                    if folder.is_dir() and _is_own(folder):
                        shutil.rmtree(folder)


def _is_own(path: Path) -> bool:
    """Return whether this user owns a path; another user may have put it into a shared folder."""
    return not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()
