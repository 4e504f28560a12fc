"""Test whether paths are inside a folder, through links too, create missing parents, and name the folder of caches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError


def contains(out: Path, paths: Iterable[Path]) -> bool:
    """Return whether an existing folder is one of the paths or a parent of one, regardless of links and case."""
    try:
        status = Path(out).stat()
    except OSError:
        return False
    chain = {
        path
        for candidate in paths
        for start in (candidate.absolute(), candidate.resolve())
        for path in (start, *start.parents)
    }
    return any(path.exists() and os.path.samestat(status, path.stat()) for path in chain)


def with_links(path: Path) -> list[Path]:
    """Return an input and the links inside it."""
    links = [
        Path(directory) / name
        for directory, folders, names in (os.walk(path) if path.is_dir() else ())
        for name in (*folders, *names)
        if (Path(directory) / name).is_symlink()
    ]
    return [path, *links]


@contextmanager
def parents_made(made: Sequence[Path], out: Path) -> Iterator[None]:
    """Create missing folders, and remove those that are still empty at the end."""
    try:
        make_folders(list(reversed(made)), out)
        yield
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def make_folders(folders: Sequence[Path], out: Path) -> None:
    """Create folders that an output needs.

    Raises:
        OutputError: one of them cannot be created.
    """
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be made: {error.strerror} ({error.filename}). Give another --out.", code="output.unwritable"
        ) from error


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of files that can be made again: `$ADAPTERMIX_CACHE`, or the user's cache.

    Args:
        environment: The environment variables.
    """
    value = environment.get("ADAPTERMIX_CACHE")
    home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(value) if value else Path(home) / "adaptermix"
