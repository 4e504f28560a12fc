"""The journal file of a search: locked by the system, and repaired if its last line was cut off."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.disk import NO_LOCKS

if TYPE_CHECKING:
    from optuna.storages.journal import BaseJournalFileLock, JournalFileBackend

_BLOCK = 2**20


class JournalLock:
    """Locks a journal while a line is appended, for optuna's journal backend.

    The journal itself is locked, so that the system releases the lock when a process dies. A last line without its end
    was cut off by a kill or a full disk before any process relied on it; it is removed before the next one is written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._threads, self._handle = path, threading.Lock(), -1

    def acquire(self) -> bool:
        """Wait for the lock.

        Raises:
            OSError: the journal cannot be opened, or its file system has no locks.
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
        """Release the lock."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1
        self._threads.release()


def _cut(handle: int) -> None:
    """Remove the bytes after the last end of a line."""
    end = os.fstat(handle).st_size
    if end == 0 or os.pread(handle, 1, end - 1) == b"\n":
        return
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            os.ftruncate(handle, start + newline + 1)
            return
        end = start
    os.ftruncate(handle, 0)


def open_journal(path: Path) -> JournalFileBackend:
    """Return optuna's backend for a journal file, which is created if it does not exist.

    Raises:
        OSError: the file cannot be opened.
    """
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock: BaseJournalFileLock | JournalLock = (
        JournalFileOpenLock(str(path)) if sys.platform == "win32" else JournalLock(path)
    )
    try:
        lock.acquire()  # This repairs an unfinished line before optuna reads it.
        lock.release()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        lock = JournalFileOpenLock(str(path))
    return JournalFileBackend(str(path), lock_obj=lock)
