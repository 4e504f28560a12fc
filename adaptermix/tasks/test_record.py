"""The record of rows that were evaluated as test data: one JSON object a line, and the hashes of the rows."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

from ..io.files import write_whole
from ..progress import Watcher
from ..provenance.row_hashes import RowHashes, pack, read_sets
from .data.files import DataFile

RECORD, ROWS = "tested.jsonl", "rows"
"""Names of the record, and of the folder next to it that has a file for each set of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One evaluation of one file as test data.

    Args:
        sha256: Hash of the file's bytes.
        text: Hash of its lines.
        name: The file's name then.
        task: The task.
        adapter: Name of the adapter, or `base`.
        date: The day (UTC).
        picked: The rows that were used, as `START:STOP[:STEP]`; None for all.
        row_hashes: Name of the set of their hashes; None where it is not known, as in older records.
        hashes: The set; None where it is not known. Then the file counts as a whole.
    """

    sha256: str
    text: str
    name: str
    task: str
    adapter: str
    date: str
    picked: str | None = None
    row_hashes: str | None = None
    hashes: RowHashes | None = field(default=None, compare=False, repr=False)

    @property
    def file_hashes(self) -> set[str]:
        return {self.sha256, self.text}


_WRITTEN = [item.name for item in fields(Evaluated) if item.name != "hashes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record as it was read.

    Args:
        entries: The evaluations, the first one first.
        faults: Sentences on parts that cannot be read; later use of such rows is not refused.
    """

    entries: tuple[Evaluated, ...]
    faults: tuple[str, ...] = ()

    def announce(self, watch: Watcher) -> None:
        """Report faults of the record."""
        for fault in self.faults:
            watch.note(f"warning: {fault} Test data that it named may be used for choosing or training unnoticed.")


def state_folder() -> Path:
    """Return this user's folder for files that stay between runs.

    Raises:
        RuntimeError: the user has no home.
    """
    if folder := os.environ.get("ADAPTERMIX_STATE"):
        return Path(folder)
    name, usual = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_STATE_HOME", ".local/state")
    return Path(os.environ.get(name) or Path.home() / usual) / "adaptermix"


def read_record() -> Record:
    """Return the record; it is empty before the first evaluation."""
    try:
        path = state_folder() / RECORD
        content = path.read_bytes()
    except FileNotFoundError:
        return Record(entries=())
    except (OSError, RuntimeError) as error:
        return Record(entries=(), faults=(f"the record of test data cannot be read ({error}).",))
    return _parsed(path, content)


def _parsed(path: Path, content: bytes) -> Record:
    entries, broken, lacking = [], [], {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = _entry(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            broken.append(str(number))
            continue
        if entry.row_hashes and entry.hashes is None:
            lacking[entry.row_hashes] = entry.name
        entries.append(entry)
    faults = []
    if broken:
        faults.append(f"{path} is damaged in line {', '.join(broken)}, which is skipped: delete it, or restore it.")
    if lacking:
        names = ", ".join(sorted(set(lacking.values())))
        faults.append(
            f"hashes of the rows of {names} are missing or damaged in {path.parent / ROWS}, so that these files are "
            "recognised by their whole text only: evaluate them again to record them."
        )
    return Record(entries=tuple(entries), faults=tuple(faults))


def _entry(document: object) -> Evaluated:
    if not isinstance(document, dict):
        raise TypeError("an entry is an object")
    written = {name: str(document[name]) for name in _WRITTEN if document.get(name) is not None}
    return Evaluated(**written, hashes=_rows(written.get("row_hashes", "")))


def _rows_file(key: str) -> Path:
    return state_folder() / ROWS / f"{key}.rows"


def _rows(key: str) -> RowHashes | None:
    if not key.isalnum():
        return None
    try:
        return read_sets(_rows_file(key)).get(key)
    except (OSError, ValueError):
        return None


def _evaluated(file: DataFile, task: str, adapter: str) -> Evaluated:
    entry = file.entry()
    return Evaluated(
        **file.hashes(),
        name=file.path.name,
        task=task,
        adapter=adapter,
        date=datetime.now(UTC).date().isoformat(),
        picked=file.used.picked if file.used else None,
        row_hashes=str(entry["row_hashes"]) if file.used else None,
        hashes=file.row_hashes(),
    )


def add_to_record(files: Sequence[DataFile], *, task: str, adapter: str, watch: Watcher) -> None:
    """Record rows that were evaluated as test data, or say that the record cannot be written.

    Args:
        files: The files.
        task: Name of the task.
        adapter: Name of the adapter, or `base`.
        watch: Receives where the record is when it gets new files, and a failure.
    """
    known = read_record()
    new = [entry for entry in (_evaluated(file, task, adapter) for file in files) if entry not in known.entries]
    sets = {entry.hashes.key: entry.hashes for entry in new if entry.hashes}
    lines = [json.dumps({name: getattr(entry, name) for name in _WRITTEN}, ensure_ascii=False) for entry in new]
    try:
        folder = state_folder()
        for key, hashes in sets.items():
            (folder / ROWS).mkdir(parents=True, exist_ok=True)
            write_whole(_rows_file(key), pack({key: hashes}))
        _append(folder, lines)
    except (OSError, RuntimeError) as error:
        watch.note(
            f"warning: the record of test data must be writable, and is not ({error}): later use of these files for "
            "choosing or training is not refused. Set ADAPTERMIX_STATE to another folder."
        )
        return
    before = {(entry.text, entry.picked) for entry in known.entries}
    if count := len({(entry.text, entry.picked) for entry in new} - before):
        watch.note(
            f"{count} of the files are now recorded as test data in {folder / RECORD}; choosing or training on "
            "their rows is refused from here on."
        )


def _append(folder: Path, lines: Sequence[str]) -> None:
    if not lines:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RECORD).open("ab+", buffering=0) as file:
        # else this process could see half of a line that another one is writing
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        is_cut = bool(end) and file.read(1) != b"\n"  # a line that was cut stays separate
        file.write(("\n" * is_cut + "".join(f"{line}\n" for line in lines)).encode("utf-8", "surrogatepass"))
