"""Files and folders: outputs that appear whole or not at all, inputs by path or glob, content hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Self

from .errors import OutputError

MANIFEST = "adaptermix.json"
ROWS_FILE = "adaptermix.rows"
"""Hashes of the data rows that the manifest beside it names."""
LOCK = ".lock"
"""What a process holds while it works in a folder."""
_OURS = (MANIFEST, "adapter_config.json")


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_path(out: Path) -> Path:
    """Return the folder beside an output that holds its unfinished work."""
    return out.parent / f".{out.name}.partial"


def _check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that no tool of this family wrote."""
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in _OURS):
        raise OutputError(
            f"only an adapter folder can be overwritten, and {out} holds neither {' nor '.join(_OURS)}. "
            "Choose another --out, or remove the folder yourself."
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"an output must be a folder, and {out} is a file. Choose another --out.")


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written, before any work is done.

    Raises:
        OutputError: it exists and `overwrite` is not set, it is no adapter folder, or its parent is not writable.
    """
    if os.path.lexists(out) and not overwrite:
        raise OutputError(f"the output folder {out} exists. Pass --overwrite to replace it, or choose another.")
    _check_replaceable(out)
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"the output folder {out} cannot be made: {parent} is not a writable folder.")


@contextmanager
def held(folder: Path, out: Path) -> Iterator[None]:
    """Hold a folder of work in progress, so that no other process works on the same output.

    Args:
        folder: The folder; it is made.
        out: The output, for the message.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"one process at a time may work on {out}, and another one does. Wait for it, or give another --out."
        ) from error
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror} ({folder}). Give another --out.") from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def check_not_input(out: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse to replace what is being read.

    Raises:
        OutputError: the output folder is one of the inputs.
    """
    for path in inputs:
        if out.resolve() == Path(path).resolve():
            raise OutputError(f"the output must not be one of the inputs, and {out} is. Choose another --out.")


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: as `check_output`.
    """
    check_output(out, overwrite=overwrite)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file() and not path.is_symlink():  # some writers, safetensors among them, leave 0600
                path.chmod(0o666 & ~_umask())
        if os.path.lexists(out):
            os.replace(out, old / "replaced")
        os.replace(temporary, out)
    finally:
        if (old / "replaced").exists() and not os.path.lexists(out):
            os.replace(old / "replaced", out)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class WriteBehind:
    """Lets the disk begin with what a growing file holds while the rest of it is made.

    Who writes never waits for the disk: while it is busy with one part, other parts are left to the system, which
    writes them when it likes. So are all where the system takes no such hints.

    Args:
        file: Descriptor of an open file.
    """

    _STEP = 2**25

    def __init__(self, file: int) -> None:
        self._file, self._lock, self._passed = file, Lock(), 0
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
