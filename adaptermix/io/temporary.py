"""Temporary folders, which the next run removes if a process was killed, and the removal of unfinished work."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from uuid import uuid4

from .disk import locked, uninterrupted

_PREFIX = "adaptermix-"
_WHEN_WRITTEN: ContextVar[Mapping[Path, Callable[[], None]]] = ContextVar("when_written", default={})  # noqa: B039


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
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            with uninterrupted():
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


@contextmanager
def when_written(path: Path, clean_up: Callable[[], None]) -> Iterator[None]:
    """Let an output that the block writes be followed at once by the removal of its unfinished work.

    SIGINT and SIGTERM wait for both, so that unfinished work never stays next to a finished output.

    Args:
        path: The output, as `real_path` returns it.
        clean_up: Removes the unfinished work.
    """
    token = _WHEN_WRITTEN.set({**_WHEN_WRITTEN.get(), path: clean_up})
    try:
        yield
    finally:
        _WHEN_WRITTEN.reset(token)


def clean_up_after(path: Path) -> None:
    """Remove the unfinished work of an output that has its name now; see `when_written`."""
    if clean_up := _WHEN_WRITTEN.get().get(path):
        clean_up()
