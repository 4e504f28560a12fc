"""Folders of a bounded total size on disk, shared by processes.

A server may read a folder again at any time after it has got its path. So a folder that a running process has taken
is never removed; of the other folders, those used longest ago are removed first.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout

from ..errors import OutputError

_PATIENCE = 600
"""Seconds to wait while other folders are made; after them a `filelock.Timeout` ends the call."""


class FolderCache:
    """Folders by key.

    Args:
        root: Folder of the cache; created when it is first used.
        limit: Most bytes of all folders.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._folders, self._users, self._staging = root / "folders", root / "users", root / "staging"
        self._list = self._users / uuid.uuid4().hex
        self._list_lock: FileLock | None = None
        self._taken: set[str] = set()
        self._lock = Lock()

    def get(self, key: str, make: Callable[[Path], Path]) -> Path:
        """Return the folder of a key, which this process has then taken; make it if it is missing.

        One folder is made at a time, also by several processes. Two calls with one key at the same time make one
        folder.

        Args:
            key: A name that is safe in paths.
            make: Writes into an empty folder, and returns the folder in it that becomes the key's.

        Raises:
            OutputError: the folders that running processes have taken leave no room.
            OSError: the disk is full or fails, or other folders are made for longer than ten minutes.
        """
        for folder in (self._folders, self._users):
            folder.mkdir(parents=True, exist_ok=True)
        path = self._take(key)
        if path is not None:
            return path
        with FileLock(self.root / "making.lock", timeout=_PATIENCE):
            path = self._take(key)
            if path is not None:
                return path
            # Only a killed process leaves something here, since the lock is held.
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir()
            try:
                self._make_room(0)
                return self._put(key, make(self._staging))
            finally:
                shutil.rmtree(self._staging, ignore_errors=True)

    def _index(self) -> FileLock:
        """Return the lock that is held for the short times in which folders are taken, added or removed."""
        return FileLock(self.root / "index.lock")

    def _take(self, key: str) -> Path | None:
        """Take the folder of a key for this process, if there is one."""
        with self._index():
            path = self._folders / key
            if not path.is_dir():
                return None
            self._record(key)
            with suppress(OSError):  # Only the order of removal depends on it.
                os.utime(path)
            return path

    def _record(self, key: str) -> None:
        """Write to this process's list that it has taken a folder; other processes read the list while it runs."""
        with self._lock:
            if key in self._taken:
                return
            if self._list_lock is None:
                lock = FileLock(self._list.with_suffix(".lock"), thread_local=False)
                lock.acquire(timeout=0)
                self._list_lock = lock
            with self._list.open("a", encoding="ascii") as file:
                file.write(f"{key}\n")
            self._taken.add(key)

    def _put(self, key: str, made: Path) -> Path:
        """Move a finished folder to its place, after there is room for it."""
        with self._index():
            self._make_room(_size(made), is_locked=True)
            path = self._folders / key
            self._record(key)
            os.replace(made, path)
            os.utime(path)
            return path

    def _make_room(self, size: int, *, is_locked: bool = False) -> None:
        """Remove the folders that were used longest ago until there is room; of size 0, for at least one byte."""
        if not is_locked:
            with self._index():
                self._make_room(size, is_locked=True)
            return
        taken = self._taken_by_all()
        folders = sorted((path for path in self._folders.iterdir()), key=lambda path: path.stat().st_mtime_ns)
        sizes = {path: _size(path) for path in folders}
        free = self.limit - sum(sizes.values())
        for path in folders:
            if free >= max(size, 1):
                return
            if path.name not in taken:
                shutil.rmtree(path)
                free += sizes[path]
        if free < max(size, 1):
            raise OutputError(
                f"the merges in {self.root} must fit in {self.limit / 1e9:.3g} GB, and those that running servers use "
                f"leave {max(free, 0) / 1e9:.3g} GB. Raise ADAPTERMIX_SERVING_GB, or restart the servers.",
                code="serving.cache-full",
            )

    def _taken_by_all(self) -> set[str]:
        """Return the keys that running processes have taken; the lists of others are removed."""
        return {key for path in self._running() for key in path.read_text(encoding="ascii").splitlines()}

    def _running(self) -> Iterator[Path]:
        for lock_path in list(self._users.glob("*.lock")):
            path = lock_path.with_suffix("")
            lock = FileLock(lock_path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if path.exists():
                    yield path
                continue
            path.unlink(missing_ok=True)
            lock_path.unlink(missing_ok=True)
            lock.release()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
