"""What the system must do with files so that neither a crash nor another process loses any: sync, swap, lock."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from ..errors import OutputError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What file systems without locks answer."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk when this returns.

    Without it a power cut after a rename may leave the new name with an empty file. File systems that cannot sync a
    folder are left alone.

    Raises:
        OSError: the disk is full or fails.
    """
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows syncs names by itself
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync all files below a folder, and the folders themselves.

    Raises:
        OSError: as `sync`.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(place) / name).is_symlink():
                sync(Path(place) / name)
        sync(Path(place))


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; return False where the system cannot, and nothing has changed.

    Raises:
        OSError: the system can, and failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # an old kernel, or a file system without it
        return False
    raise OSError(code, os.strerror(code), str(second))


def _flock(handle: int) -> None:
    """Lock an open file, or do nothing on a file system without locks, where work must be possible too."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _take(path: Path) -> int:
    """Return the descriptor of a lock file that this process now holds."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _flock(handle)
            # the process that held it before may have removed the file since, and a third one could make another
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however it ends.

    The file is removed at the end. One that a killed process left behind is taken over.

    Raises:
        BlockingIOError: another process, or another thread of this one, holds it.
        OSError: the file cannot be made.
    """
    if sys.platform == "win32":
        from filelock import FileLock, Timeout

        try:
            with FileLock(path, timeout=0):
                yield
        except Timeout as error:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock", str(path)) from error
        return
    handle = _take(path)
    try:
        yield
    finally:
        with uninterrupted():
            path.unlink(missing_ok=True)
            os.close(handle)


def check_space(folder: Path, size: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: An existing folder on it.
        size: Bytes that are to be written.

    Raises:
        OutputError: less is free.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(
            f"the disk of {folder.parent} must have room for {size / 1e9:.2f} GB, and has {free / 1e9:.2f} GB. Make "
            "room, or give an --out on another disk."
        )


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep SIGINT and SIGTERM back while the block, which must be short, clears up; they act after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def remember(number: int, _frame: object) -> None:
        caught.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # of a program that is not Python
                signal.signal(number, handler)
        for late in caught:
            os.kill(os.getpid(), late)


class WriteBehind:
    """Lets the disk begin with what a growing file holds while the rest of it is made.

    Who writes never waits for the disk: while it is busy with one part, other parts are left to the system, which
    writes them when it likes. So are all where the system takes no such hints.

    Args:
        file: Descriptor of an open file.
    """

    _STEP = 2**25

    def __init__(self, file: int) -> None:
        self._file, self._lock, self._passed = file, threading.Lock(), 0
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def reached(self, end: int) -> None:
        """Tell that the file holds all before a place, or nearly all.

        Args:
            end: The place, in bytes.
        """
        if not hasattr(os, "posix_fadvise") or end - self._passed < self._STEP:
            return
        with self._lock:
            if end - self._passed >= self._STEP and (self._last is None or self._last.done()):
                # "not needed" begins to write pages that are not on the disk yet, and keeps them in memory until then
                hint = (self._file, end - self._STEP, self._STEP, os.POSIX_FADV_DONTNEED)
                self._last, self._passed = self._pool.submit(os.posix_fadvise, *hint), end
