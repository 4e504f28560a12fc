"""The journal file of a search: locked by the system, and without a last line that was cut off."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from ..io.disk import NO_LOCKS

_BLOCK = 2**20


class JournalLock:
    """Holds a journal while a line is appended.

    The journal itself is locked, so that the system releases it when a process dies. A last line without its end was
    cut off by a kill or a full disk before anyone relied on it: it is removed before the next one is written.

    Args:
        path: The journal.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._threads, self._handle = path, threading.Lock(), -1

    def acquire(self) -> bool:
        """Wait for the journal.

        Raises:
            OSError: it cannot be opened, or its file system has no locks.
        """
        import fcntl

        self._threads.acquire()
        try:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            _cut(self._handle)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Let others have the journal."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1
        self._threads.release()


def _cut(handle: int) -> None:
    """Remove what follows the last end of a line."""
    end = os.fstat(handle).st_size
    if end == 0 or os.pread(handle, 1, end - 1) == b"\n":
        return
    while end > 0:
        start = max(0, end - _BLOCK)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            os.ftruncate(handle, start + found + 1)
            return
        end = start
    os.ftruncate(handle, 0)


def open_journal(path: Path) -> Any:
    """Return optuna's backend for a journal file, which is made if there is none.

    Raises:
        OSError: it cannot be opened.
    """
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock: Any = JournalFileOpenLock(str(path)) if sys.platform == "win32" else JournalLock(path)
    try:
        lock.acquire()  # an unfinished line goes before it is read
        lock.release()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        lock = JournalFileOpenLock(str(path))
    return JournalFileBackend(str(path), lock_obj=lock)
