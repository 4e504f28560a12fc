"""Files and folders: outputs that appear whole or not at all, inputs by path or glob, content hashes."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .disk import exchange, locked, sync, sync_tree, uninterrupted
from .launcher import is_main_process

MANIFEST = "adaptermix.json"
ROWS_FILE = "adaptermix.rows"
"""Hashes of the data rows that the manifest beside it names."""
_OURS = (MANIFEST, "adapter_config.json")
_WITHOUT_LIST = (
    *(*_OURS, "README.md", "adapter_model.safetensors", "adapter_model.bin", "history.jsonl", "results.json"),
    *("report.html", "weights.png", "languages.png", "parameters.png", "layers.png", "cost.png"),
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja"),
)
"""Names in the outputs of versions whose manifests list no files, and in PEFT's adapters."""
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
RECORDED: ContextVar[Path | None] = ContextVar("recorded", default=None)
"""The output that a recipe's step is recorded for; the record of any other output ends when that is replaced."""


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def real_path(out: Path) -> Path:
    """Return where an output is, with links in its parents resolved; a link at its own name stays one."""
    out = Path(out)
    return out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name


def partial_path(out: Path) -> Path:
    """Return the folder beside an output that holds its unfinished work."""
    return out.parent / f".{out.name}.partial"


def remove_partial(out: Path, *patterns: str) -> None:
    """Remove one's own unfinished work of an output: another command's stays, for it to go on with.

    Args:
        out: The output.
        patterns: Globs of the files.
    """
    folder = partial_path(out)
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def beside(out: Path, purpose: str) -> Path:
    """Return the hidden path beside an output that serves a purpose, always the same one."""
    return out.parent / f".{out.name}.adaptermix-{purpose}"


def listed_files(folder: Path) -> set[str] | None:
    """Return the files that an output's manifest lists, by relative path with slashes; None if it lists none."""
    found = _manifest(folder).get("files")
    if not isinstance(found, list):
        return None
    names = (name for name in found if isinstance(name, str) and "\0" not in name)
    return {MANIFEST, *(name for name in names if not {"/", ".."} & {*Path(name).parts})}


def _manifest(folder: Path) -> dict[str, Any]:
    """Return an output's manifest; an empty one where there is none that can be read."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def has_edited_card(folder: Path) -> bool:
    """Return whether somebody changed the card of an output since it was written, as far as its manifest tells."""
    written, path = _manifest(folder).get("card_sha256"), folder / "README.md"
    return isinstance(written, str) and path.is_file() and sha256(path) != written


def is_part(path: str, listed: set[str] | None) -> bool:
    """Return whether a file belongs to an output or an adapter.

    Args:
        path: Its path in the folder, with slashes.
        listed: The files that the manifest lists; None if it lists none, then known names decide.
    """
    return path in listed if listed is not None else any(fnmatch.fnmatchcase(path, p) for p in _WITHOUT_LIST)


def foreign_files(folder: Path) -> list[str]:
    """Return what lies in an output folder and is not part of the output: unlisted files, links, empty folders."""
    listed = listed_files(folder)
    found = []
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in [*names, *links]:
            path = (inside / name).as_posix()
            if not is_part(path, listed) or (Path(place) / name).is_symlink():
                found.append(path)
        if not names and not folders and place != str(folder):
            found.append(f"{inside.as_posix()}/")
    return sorted(found)


def _check_replaceable(out: Path) -> None:
    """Refuse to replace what this toolkit did not write."""
    if out.is_symlink():
        raise OutputError(f"an output must be a folder, and {out} is a link to {os.readlink(out)}. Give another --out.")
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"an output must be a folder, and {out} is a file. Choose another --out.")
    if os.path.ismount(out):
        raise OutputError(f"an output must be a folder that can be replaced, and {out} is a mount point: add a name.")
    if any(out.iterdir()) and not any((out / name).exists() for name in _OURS):
        raise OutputError(
            f"only an adapter folder can be overwritten, and {out} holds neither {' nor '.join(_OURS)}. "
            "Choose another --out, or remove the folder yourself."
        )
    if others := foreign_files(out):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise OutputError(
            f"--overwrite replaces only files that adaptermix wrote, and {out} also holds "
            f"{', '.join(map(repr, others[:3]))}{more}. Move them away, or choose another --out."
        )
    if has_edited_card(out):
        raise OutputError(
            f"--overwrite keeps cards that somebody edited, and {out / 'README.md'} was edited. Move it away first."
        )


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written, before any work is done.

    Raises:
        OutputError: it exists and `overwrite` is not set, it holds what this toolkit did not write, it is the current
            folder or a parent of it, or its parent is not writable.
    """
    out = Path(out)
    if os.path.lexists(out) and not overwrite:
        raise OutputError(f"the output folder {out} exists. Pass --overwrite to replace it, or choose another.")
    if _contains(out, [Path.cwd()]):
        raise OutputError(
            f"an output is a folder of its own, and {out} is the current folder or a parent of it. Give another --out."
        )
    _check_replaceable(real_path(out))
    parent = real_path(out).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"the output folder {out} cannot be made: {parent} is not a writable folder.")


def remove_output(out: Path) -> None:
    """Remove an output, if it is there and holds nothing else.

    Raises:
        OutputError: it holds what this toolkit did not write.
    """
    _check_replaceable(out)
    if out.exists():
        shutil.rmtree(out)


@contextmanager
def output_lock(out: Path) -> Iterator[None]:
    """Hold an output while the block runs, so that no other process or thread writes it.

    Inside the block the same output may be locked again. Of several processes of one training only the main one locks.
    What a killed process left beside the output is cleared away, or put back where it was about to replace it.

    Raises:
        OutputError: another process holds it, or the lock cannot be made.
    """
    place = real_path(out)
    if place in _HELD.get() or not is_main_process():
        yield
        return
    made = [parent for parent in place.parents if not parent.exists()]
    with _parents(made, out):
        try:
            lock = locked(beside(place, "lock"))
            lock.__enter__()
        except BlockingIOError as error:
            raise OutputError(
                f"one process at a time may work on {out}, and another one does. Wait for it, or give another --out."
            ) from error
        except OSError as error:
            raise OutputError(f"{out} cannot be made: {error.strerror}. Give another --out.") from error
        token = _HELD.set(_HELD.get() | {place})
        try:
            _clear_up(place)
            yield
        finally:
            _HELD.reset(token)
            lock.__exit__(None, None, None)


@contextmanager
def _parents(made: Sequence[Path], out: Path) -> Iterator[None]:
    """Make missing folders, and remove those again that are empty at the end."""
    try:
        for parent in reversed(made):
            parent.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror} ({error.filename}). Give another --out.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def _clear_up(place: Path) -> None:
    """Finish what a killed process began: its unfinished folder goes, an output it had moved away comes back."""
    old = beside(place, "old")
    if old.is_dir() and not os.path.lexists(place):
        os.replace(old, place)
    for left in (old, beside(place, "new")):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def held(folder: Path, out: Path) -> Iterator[None]:
    """Hold an output and a folder of its unfinished work, which is made.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    with output_lock(out):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{out} cannot be made: {error.strerror} ({folder}). Give another --out.") from error
        yield


def _contains(out: Path, paths: Iterable[Path]) -> bool:
    """Return whether an existing folder is one of the paths or a parent of one, whatever links or case say."""
    try:
        own = Path(out).stat()
    except OSError:
        return False
    chain = {
        place for path in paths for start in (path.absolute(), path.resolve()) for place in (start, *start.parents)
    }
    return any(place.exists() and os.path.samestat(own, place.stat()) for place in chain)


def _with_targets(path: Path) -> list[Path]:
    """Return an input and what links inside it point to."""
    links = [
        Path(place) / name
        for place, folders, names in (os.walk(path) if path.is_dir() else ())
        for name in (*folders, *names)
        if (Path(place) / name).is_symlink()
    ]
    return [path, *links]


def check_not_input(out: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse to replace what is being read, by whatever path it is named.

    Args:
        out: The output.
        inputs: Files and folders; what does not exist, such as a Hub id, is passed over.

    Raises:
        OutputError: the output is one of the inputs, holds one, or lies in one already.
    """
    out = Path(out)
    for given in inputs:
        path = Path(given)
        if not path.exists():
            if real_path(out) == real_path(path):
                raise OutputError(f"the output must not be one of the inputs, and {out} is. Choose another --out.")
            continue
        if out.exists() and out.samefile(path):
            raise OutputError(f"the output must not be one of the inputs, and {out} is. Choose another --out.")
        if _contains(out, _with_targets(path)):
            raise OutputError(f"the output must not hold an input, and {path} lies in {out}. Choose another --out.")
        if out.exists() and path.is_dir() and _contains(path, [out]):
            raise OutputError(
                f"an existing output must not be part of an input, and {out} lies in {path}. Choose another --out."
            )


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    Its manifest, if it has one, then lists its files, and everything is on the disk.

    Raises:
        OutputError: as `check_output`, before the block and once more after it; another process works on it.
    """
    place = real_path(out)
    check_output(out, overwrite=overwrite)
    with output_lock(place):
        check_output(place, overwrite=overwrite)
        temporary = beside(place, "new")
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file() and not path.is_symlink():  # some writers, safetensors among them, leave 0600
                    path.chmod(0o666 & ~_umask())
            _list_files(temporary)
            sync_tree(temporary)
            with uninterrupted():
                check_output(place, overwrite=overwrite)  # another program may have put something there
                _put(temporary, place)
        finally:
            with uninterrupted():
                shutil.rmtree(temporary, ignore_errors=True)


def _list_files(folder: Path) -> None:
    """Have the manifest of an output, and those in folders inside it, list the files there."""
    for path in folder.rglob(MANIFEST):
        try:
            document: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # a file of this name that came with a base model
            continue
        if not isinstance(document, dict):
            continue
        inside = (file for file in path.parent.rglob("*") if file.is_file() and file != path)
        document["files"] = sorted(file.relative_to(path.parent).as_posix() for file in inside)
        path.write_bytes(manifest_bytes(document))


def manifest_bytes(document: Any) -> bytes:
    """Return a manifest's bytes: sorted keys, two spaces, a final newline."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n").encode()


def _put(temporary: Path, place: Path) -> None:
    """Put a finished folder in its place; what was there is then at the temporary path, or gone."""
    if not os.path.lexists(place):
        os.replace(temporary, place)
    elif not exchange(temporary, place):
        old = beside(place, "old")
        os.replace(place, old)
        try:
            os.replace(temporary, place)
        except BaseException:
            os.replace(old, place)
            raise
        sync(place.parent)
        shutil.rmtree(old, ignore_errors=True)
    if RECORDED.get() != place:
        beside(place, "step").unlink(missing_ok=True)
    sync(place.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; a device, a pipe or a link is written through, not replaced."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with path.open("wb") as file:
            file.write(content)
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        Path(temporary).chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
