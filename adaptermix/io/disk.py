"""Wrappers of system calls that protect files against crashes and other processes: sync, swap, lock."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from ..errors import OutputError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Error codes of file systems that have no locks."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk.

    Without this, a power failure after a rename may leave an empty file under the new name. File systems that
    cannot sync a folder are skipped.

    Raises:
        OSError: the disk is full or fails.
    """
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows syncs names without being asked.
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
    for folder_path, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(folder_path) / name).is_symlink():
                sync(Path(folder_path) / name)
        sync(Path(folder_path))


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step. Return False, with nothing changed, if the system does not support it.

    Raises:
        OSError: the system supports it, and it failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # An old kernel, or a file system without this operation.
        return False
    raise OSError(code, os.strerror(code), str(second))


def _flock(handle: int, *, needs_locks: bool) -> None:
    """Lock an open file. File systems without locks are used without one, unless the caller needs them."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if needs_locks or error.errno not in NO_LOCKS:
            raise


def _take(path: Path, *, needs_locks: bool = False) -> int:
    """Lock a file, creating it if needed, and return its descriptor."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _flock(handle, needs_locks=needs_locks)
            # The process that had the lock may have removed the file since, and a third process may have created it
            # again.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def locked(path: Path, *, needs_locks: bool = False) -> Iterator[None]:
    """Lock a file while the block runs; the system releases the lock when the process ends in any way.

    The file is removed at the end. A lock file that a killed process left is reused.

    Args:
        path: The file.
        needs_locks: Fail on a file system without locks, instead of running the block without one.

    Raises:
        BlockingIOError: another process, or another thread of this one, has the lock.
        OSError: the file cannot be created.
    """
    if sys.platform == "win32":
        from filelock import FileLock, Timeout

        try:
            with FileLock(path, timeout=0):
                yield
        except Timeout as error:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock", str(path)) from error
        return
    handle = None
    try:
        with uninterrupted():
            handle = _take(path, needs_locks=needs_locks)
        yield
    finally:
        with uninterrupted():
            if handle is not None:
                path.unlink(missing_ok=True)
                os.close(handle)


def open_temporary(path: Path, name: Path) -> tuple[int, Path]:
    """Open an empty file that is to replace a path, and return its descriptor and its path.

    It has the same name each time, so that the next run reuses a file that a killed process left. While another process
    or thread writes the same file, or where files cannot be locked, it has a random name.

    Args:
        path: The path to replace.
        name: The usual name, next to it.

    Raises:
        OSError: no file can be created there.
    """
    if sys.platform != "win32":
        try:
            handle = _take(name, needs_locks=True)
        except OSError:  # The lock, since any other failure repeats below.
            pass
        else:
            os.ftruncate(handle, 0)
            return handle, name
    handle, random_name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    return handle, Path(random_name)


def check_space(folder: Path, size: int) -> None:
    """Refuse a write that the disk does not have room for.

    Args:
        folder: An existing folder on that disk.
        size: Bytes to write.

    Raises:
        OutputError: less than `size` is free.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(
            f"the disk of {folder.parent} must have room for {size / 1e9:.2f} GB, and has {free / 1e9:.2f} GB. Free "
            "some space, or give an --out on another disk.",
            code="disk.full",
        )


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block, which must be short, has ended."""
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
            if handler is not None:  # None is a handler that was not installed from Python and cannot be restored.
                signal.signal(number, handler)
        for late in caught:
            os.kill(os.getpid(), late)


class WriteBehind:
    """Starts writing a growing file to disk while the rest of it is still produced.

    The writer never waits for the disk. While one part is being flushed, other parts are left to the system's own
    write-back, as is everything on systems without `posix_fadvise`.

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
        """Report that the file is complete, or nearly so, up to a byte offset.

        Args:
            end: The offset.
        """
        if not hasattr(os, "posix_fadvise") or end - self._passed < self._STEP:
            return
        with self._lock:
            if end - self._passed >= self._STEP and (self._last is None or self._last.done()):
                # DONTNEED starts writing pages that are not on the disk yet, and keeps them in memory until they are.
                hint = (self._file, end - self._STEP, self._STEP, os.POSIX_FADV_DONTNEED)
                self._last, self._passed = self._pool.submit(os.posix_fadvise, *hint), end
