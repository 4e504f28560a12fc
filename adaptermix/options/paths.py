"""The files and folders that a command reads and writes, by the roles of its options."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from ..errors import OutputError
from ..io.files import check_not_input, is_part, listed_files, output_lock, sha256
from .base import Settings
from .roles import Reads, Writes, marks_of, values_of

P = ParamSpec("P")
T = TypeVar("T")
SettingsType = TypeVar("SettingsType", bound=Settings)


def paths_of(argument: str) -> list[Path]:
    """Return the existing files and folders that an argument names: a path, a glob, or one of these after `=`.

    A revision after `@` is left out.
    """
    for text in (argument, argument.partition("=")[2], argument.rpartition("@")[0]):
        if text and "\0" not in text:
            existing = [text] if os.path.exists(text) else sorted(glob.glob(text))
            if existing:
                return [Path(path) for path in existing]
    return []


def input_paths(settings: Settings) -> list[Path]:
    """Return the existing files and folders that a command with these settings reads."""
    return [path for value in values_of(settings, marks_of(settings, Reads)) for path in paths_of(value)]


def written_paths(settings: Settings) -> list[Path]:
    """Return the files and folders that a command with these settings writes."""
    return [Path(value) for value in values_of(settings, marks_of(settings, Writes))]


def check_written(settings: Settings) -> None:
    """Refuse settings whose outputs would replace what the command reads.

    Raises:
        OutputError: an output is an input, or a folder that holds one.
    """
    inputs = input_paths(settings)
    for path in written_paths(settings):
        if path.exists() and not getattr(settings, "overwrite", True):
            continue  # an existing output is refused in any case
        if path.is_dir() or path == Path(getattr(settings, "out", "")):
            check_not_input(path, inputs)
        else:
            check_file_not_input(path, inputs)
    for option, mark in marks_of(settings, Writes).items():
        named = getattr(settings, option)
        # without permission to replace, an existing file is refused in any case
        if mark.form and named and getattr(settings, "overwrite", True):
            check_replaceable(Path(named), mark.form)


def _has_answer(head: bytes) -> bool:
    try:
        row = json.loads(head.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "answer" in row


_HEAD = 2**20
_FORMS: dict[str, tuple[Callable[[bytes], bool], str]] = {
    "predictions": (_has_answer, "answers of `evaluate --predictions`"),
    "markdown": (lambda head: head.startswith(b"| system |"), "a table of `compare --markdown`"),
    "document": (lambda head: head.startswith(b"{") and b'"systems"' in head, "a document of `compare --document`"),
    "csv": (lambda head: head.startswith(b"module,layer,kind,"), "a table of `spectrum --csv`"),
    "table": (lambda head: head.startswith((b"| layer | model |", b"layer,model,")), "a table of `spectrum --table`"),
    "out": (lambda head: b'content="adaptermix report"' in head, "a page of `adaptermix report`"),
    "plot": (
        lambda head: head.startswith(b"\x89PNG") and (b"adaptermix" in head or b"Matplotlib" in head),
        "a picture of this toolkit",
    ),
}
"""How a file of each form is recognised, and its description; no other file is replaced."""


def check_replaceable(path: Path, form: str) -> None:
    """Refuse to replace a file that no command of this toolkit wrote in the same form.

    Args:
        path: The file to write.
        form: Form of the file, which has the name of the option; see `_FORMS`.

    Raises:
        OutputError: there is a file of another form, or one that cannot be read.
    """
    if not path.is_file():
        return
    is_own, what = _FORMS[form]
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise OutputError(
            f"--{form} must be a file that can be replaced, and {path} is not: {error}.", code="replace.not-file"
        ) from error
    if head and not is_own(head):
        raise OutputError(
            f"--{form} replaces only {what}, and {path} holds something else. Give another file.",
            code="replace.other-content",
        )


_WEIGHTS = {".safetensors", ".bin", ".gguf", ".model"}


def check_file_not_input(path: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to replace a file that a command reads, alone or as a part of an adapter or a model.

    Args:
        path: The file to write.
        inputs: Files and folders; those that do not exist, such as Hub ids, are skipped.

    Raises:
        OutputError: the file is an input, or belongs to one.
    """
    if not path.is_file():
        return
    for path_read in map(Path, inputs):
        if path_read.exists() and path.samefile(path_read):
            raise OutputError(
                f"an output must not be one of the inputs, and {path} is. Give another file.", code="output.is-input"
            )
        if not path_read.is_dir() or not path.resolve().is_relative_to(path_read.resolve()):
            continue
        name = path.resolve().relative_to(path_read.resolve()).as_posix()
        if path.suffix in _WEIGHTS or is_part(name, listed_files(path_read)):
            raise OutputError(
                f"an output must not be part of an input, and {path} is. Give another file.", code="output.in-input"
            )


@contextmanager
def writing(settings: Settings) -> Iterator[None]:
    """Hold the output folder of a command from its start to its end; a dry run holds nothing.

    Raises:
        OutputError: the output would replace an input, or another process works on it.
    """
    if getattr(settings, "dry_run", False):
        yield
        return
    check_written(settings)
    out = getattr(settings, "out", None)
    with output_lock(Path(out)) if out else nullcontext():
        yield


def holds_output(work: Callable[Concatenate[SettingsType, P], T]) -> Callable[Concatenate[SettingsType, P], T]:
    """Let a function of settings run inside `writing`."""

    @wraps(work)
    def locked(settings: SettingsType, /, *args: P.args, **more: P.kwargs) -> T:
        with writing(settings):
            return work(settings, *args, **more)

    return locked


def locks_out(work: Callable[P, T]) -> Callable[P, T]:
    """Let a function with a keyword `out` hold that folder from start to end, unless `dry_run` is set."""

    @wraps(work)
    def locked(*args: P.args, **more: P.kwargs) -> T:
        out = more.get("out")
        with nullcontext() if out is None or more.get("dry_run") else output_lock(Path(str(out))):
            return work(*args, **more)

    return locked


def digest(path: Path) -> str:
    """Return a hash of all that a file or a folder holds.

    Of an output of this toolkit those files count that its manifest lists, of other folders all but hidden ones;
    README.md, which decides nothing, is left out.
    """
    if path.is_file():
        return _hash(path)
    listed = listed_files(path)
    files = [path / name for name in listed] if listed is not None else list(_visible(path))
    names = sorted(file for file in files if file.name != "README.md" and file.is_file())
    text = "".join(f"{file.relative_to(path).as_posix()}:{_hash(file)}\n" for file in names)
    return hashlib.sha256(text.encode()).hexdigest()


def _visible(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def _hash(path: Path) -> str:
    status = path.stat()
    # the time of the last change of any kind cannot be set back, unlike that of the last edit
    return _hash_of(
        path.resolve(), (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )


@lru_cache(maxsize=4096)
def _hash_of(path: Path, _status: Sequence[int]) -> str:
    return sha256(path)
