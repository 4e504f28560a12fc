"""Files and folders: atomic outputs, inputs by path or glob, content hashes."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from ..errors import OutputError
from .disk import exchange, locked, open_temporary, sync, sync_tree, uninterrupted
from .folders import contains, make_folders, parents_made, with_links
from .json_types import JsonObject
from .launcher import is_main_process
from .temporary import clean_up_after

MANIFEST = "adaptermix.json"
ROWS_FILE = "adaptermix.rows"
"""Hashes of the data rows that the manifest in the same folder names."""
_OURS = (MANIFEST, "adapter_config.json")
_WITHOUT_LIST = (
    *(*_OURS, "README.md", "adapter_model.safetensors", "adapter_model.bin", "history.jsonl", "results.json"),
    *("report.html", "weights.png", "languages.png", "parameters.png", "layers.png", "cost.png"),
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja"),
)
"""File names in PEFT adapters and in outputs of versions whose manifests do not list files."""
_LOCKED: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
RECORDED: ContextVar[Path | None] = ContextVar("recorded", default=None)
"""Output that a recipe's step record is being written for. Replacing any other output removes its record."""


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def real_path(out: Path) -> Path:
    """Return an output's absolute path with links in its parents resolved, but not a link at its own name."""
    out = Path(out)
    return out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name


def partial_path(out: Path) -> Path:
    """Return the folder next to an output that contains its unfinished work."""
    return out.parent / f".{out.name}.partial"


def remove_partial(out: Path, *patterns: str) -> None:
    """Remove the unfinished work of one command; another command's stays, so that it can resume.

    Args:
        out: The output.
        patterns: Globs of the files to remove.
    """
    folder = partial_path(out)
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def hidden_path(out: Path, purpose: str) -> Path:
    """Return the hidden path next to an output for a purpose such as "lock"; it is always the same."""
    return out.parent / f".{out.name}.adaptermix-{purpose}"


def listed_files(folder: Path) -> set[str] | None:
    """Return the files that an output's manifest lists, as relative paths with slashes; None without such a list."""
    entries = _manifest(folder).get("files")
    if not isinstance(entries, list):
        return None
    names = (name for name in entries if isinstance(name, str) and "\0" not in name)
    return {MANIFEST, *(name for name in names if not {"/", ".."} & {*Path(name).parts})}


def _manifest(folder: Path) -> JsonObject:
    """Return an output's manifest, or an empty one if it cannot be read."""
    path = folder / MANIFEST
    try:
        # `is_file` is False for a pipe, which would block.
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def has_edited_card(folder: Path) -> bool:
    """Return whether the model card was changed since the output was written, according to its manifest."""
    written, path = _manifest(folder).get("card_sha256"), folder / "README.md"
    return isinstance(written, str) and path.is_file() and sha256(path) != written


def is_part(path: str, listed: set[str] | None) -> bool:
    """Return whether a file belongs to an output or an adapter.

    Args:
        path: Its path in the folder, with slashes.
        listed: The files that the manifest lists; None falls back to known file names.
    """
    return path in listed if listed is not None else any(fnmatch.fnmatchcase(path, p) for p in _WITHOUT_LIST)


def foreign_files(folder: Path) -> list[str]:
    """Return the paths in an output folder that are not part of the output: unlisted files, links, empty folders."""
    listed = listed_files(folder)
    paths = []
    for directory, folders, names in os.walk(folder):
        inside = Path(directory).relative_to(folder)
        links = [name for name in folders if (Path(directory) / name).is_symlink()]
        for name in [*names, *links]:
            path = (inside / name).as_posix()
            if not is_part(path, listed) or (Path(directory) / name).is_symlink():
                paths.append(path)
        if not names and not folders and directory != str(folder):
            paths.append(f"{inside.as_posix()}/")
    return sorted(paths)


def _check_replaceable(out: Path) -> None:
    """Refuse to replace a folder with files that this toolkit did not write."""
    if out.is_symlink():
        raise OutputError(
            f"an output must be a folder, and {out} is a link to {os.readlink(out)}. Give another --out.",
            code="output.is-link",
        )
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(
            f"an output must be a folder, and {out} is a file. Choose another --out.", code="output.is-file"
        )
    if os.path.ismount(out):
        raise OutputError(
            f"an output must be a folder that can be replaced, and {out} is a mount point: add a name.",
            code="output.mount-point",
        )
    if any(out.iterdir()) and not any((out / name).exists() for name in _OURS):
        raise OutputError(
            f"only an adapter folder can be overwritten, and {out} has neither {' nor '.join(_OURS)}. Choose another "
            "--out, or remove the folder yourself.",
            code="output.not-adapter",
        )
    if others := foreign_files(out):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise OutputError(
            f"--overwrite replaces only files that adaptermix wrote, and {out} also contains "
            f"{', '.join(map(repr, others[:3]))}{more}. Move them elsewhere, or choose another --out.",
            code="output.other-files",
        )
    if has_edited_card(out):
        raise OutputError(
            f"--overwrite never replaces an edited card, and {out / 'README.md'} was edited. Move it elsewhere first.",
            code="output.edited-card",
        )


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written, before any work is done.

    Raises:
        OutputError: it exists and `overwrite` is not set, it contains files that this toolkit did not write, it is the
            current folder or a parent of it, or its parent is not writable.
    """
    out = Path(out)
    if os.path.lexists(out) and not overwrite:
        raise OutputError(
            f"the output folder {out} exists. Pass --overwrite to replace it, or choose another.", code="output.exists"
        )
    if contains(out, [Path.cwd()]):
        raise OutputError(
            f"an output must be a separate folder, and {out} contains the current folder. Give another --out.",
            code="output.current-folder",
        )
    _check_replaceable(real_path(out))
    parent = real_path(out).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(
            f"the output folder {out} cannot be made: {parent} is not a writable folder.",
            code="output.parent-not-writable",
        )


def remove_output(out: Path) -> None:
    """Remove an output if it exists and contains only files of this toolkit.

    Raises:
        OutputError: it contains other files.
    """
    _check_replaceable(out)
    if out.exists():
        shutil.rmtree(out)


@contextmanager
def output_lock(out: Path) -> Iterator[None]:
    """Lock an output while the block runs, so that no other process or thread writes it.

    The lock can be taken again inside the block. In distributed training only the main process locks. Leftovers of a
    killed process are removed; an output that it was replacing is restored.

    Raises:
        OutputError: another process has the lock, or the lock file cannot be created.
    """
    path = real_path(out)
    if path in _LOCKED.get() or not is_main_process():
        yield
        return
    made = [parent for parent in path.parents if not parent.exists()]
    with parents_made(made, out):
        try:
            lock = locked(hidden_path(path, "lock"))
            lock.__enter__()
        except BlockingIOError as error:
            raise OutputError(
                f"another process is working on {out}. Wait for it, or give another --out.", code="output.busy"
            ) from error
        except OSError as error:
            raise OutputError(
                f"{out} cannot be made: {error.strerror}. Give another --out.", code="output.unwritable"
            ) from error
        token = _LOCKED.set(_LOCKED.get() | {path})
        try:
            _clear_up(path)
            yield
        finally:
            _LOCKED.reset(token)
            lock.__exit__(None, None, None)


def _clear_up(path: Path) -> None:
    """Clean up after a killed process: remove its unfinished folder, restore an output that it had moved."""
    old = hidden_path(path, "old")
    if old.is_dir() and not os.path.lexists(path):
        os.replace(old, path)
    for left in (old, hidden_path(path, "new")):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked_output(folder: Path, out: Path) -> Iterator[None]:
    """Lock an output and create the folder of its unfinished work, which is removed at the end if it is empty.

    Raises:
        OutputError: another process has the lock, or the folder cannot be created.
    """
    with output_lock(out):
        try:
            make_folders([folder], out)
            yield
        finally:
            if folder != out:
                with suppress(OSError):  # It is not empty.
                    folder.rmdir()


def check_not_input(out: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse to replace an input, by any path that leads to it.

    Args:
        out: The output.
        inputs: Files and folders. Entries that do not exist, such as Hub ids, are skipped.

    Raises:
        OutputError: the output is an input, contains one, or is inside one.
    """
    out = Path(out)
    for reference in inputs:
        path = Path(reference)
        if out.samefile(path) if out.exists() and path.exists() else real_path(out) == real_path(path):
            raise OutputError(
                f"the output must not be one of the inputs, and {out} is. Choose another --out.", code="output.is-input"
            )
        if not path.exists():
            continue
        if contains(out, with_links(path)):
            raise OutputError(
                f"the output must not hold an input, and {path} is in {out}. Choose another --out.",
                code="output.holds-input",
            )
        if out.exists() and path.is_dir() and contains(path, [out]):
            raise OutputError(
                f"an existing output must not be part of an input, and {out} is in {path}. Choose another --out.",
                code="output.in-input",
            )


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` if the block succeeds and is removed if it fails.

    At the end the manifest, if there is one, lists the folder's files, and everything is synced to disk.

    Raises:
        OutputError: as in `check_output`, before the block and again after it; or another process works on the output.
    """
    path = real_path(out)
    check_output(out, overwrite=overwrite)
    with output_lock(path):
        check_output(path, overwrite=overwrite)
        temporary = hidden_path(path, "new")
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():  # Some writers, such as safetensors, leave mode 0600.
                    file.chmod(0o666 & ~_umask())
            _list_files(temporary)
            sync_tree(temporary)
            with uninterrupted():
                check_output(path, overwrite=overwrite)  # Another program may have created something at this path.
                _put(temporary, path)
                clean_up_after(path)
        finally:
            with uninterrupted():
                shutil.rmtree(temporary, ignore_errors=True)


def _list_files(folder: Path) -> None:
    """Add a list of files to an output's manifest, and to the manifests in folders inside it."""
    for path in folder.rglob(MANIFEST):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # A file of the same name that came with a base model.
            continue
        if not isinstance(document, dict):
            continue
        inside = (file for file in path.parent.rglob("*") if file.is_file() and file != path)
        document["files"] = sorted(file.relative_to(path.parent).as_posix() for file in inside)
        path.write_bytes(manifest_bytes(document))


def manifest_bytes(document: Mapping[str, object]) -> bytes:
    """Return a manifest's bytes: sorted keys, two spaces, a final newline."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n").encode()


def _put(temporary: Path, path: Path) -> None:
    """Move a finished folder to its path. An output that was there moves to the temporary path or is removed."""
    if not os.path.lexists(path):
        os.replace(temporary, path)
    elif not exchange(temporary, path):
        old = hidden_path(path, "old")
        os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(old, path)
            raise
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    if RECORDED.get() != path:
        hidden_path(path, "step").unlink(missing_ok=True)
    sync(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically. A device, a pipe or a link is written through instead of replaced."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with path.open("wb") as file:
            file.write(content)
        return
    with uninterrupted():
        _replace(path, content)
    sync(path.parent)


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = open_temporary(path, hidden_path(path, "file"))
    with os.fdopen(handle, "wb") as file:  # Open, and so locked, until the file has its name.
        try:
            file.write(content)
            file.flush()
            os.fsync(handle)
            temporary.chmod(0o666 & ~_umask())
            if sys.platform == "win32":  # which renames no open files
                file.close()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
