"""Test data stay test data: a record of the files that were evaluated as such, on which nothing is chosen or trained.

A file is known by its text, whatever its name, its compression and its line ends, and whichever of its rows are used.
Rows that were moved, added or left out make another text. The record is this user's, one
JSON object a line; what is broken in it is passed over, and one that cannot be read is as good as empty.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import manifest
from .adapters import AdapterSource
from .data.source import DataFile, find_files
from .errors import DataError, PlanError
from .progress import Watcher

DEV, TEST, TRAINING, CALIBRATION = "dev data", "test data", "training data", "calibration data"
"""What files are used for."""
_RECORD = "tested.jsonl"


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
    """

    sha256: str
    text: str
    name: str
    task: str
    adapter: str
    date: str

    def fault(self, use: str, path: object) -> str:
        """Return what is wrong with using the file for something else, without what to do.

        Args:
            use: What it is to be, such as `DEV`.
            path: Where it is now.
        """
        then = "" if str(path).endswith(self.name) else f", then named {self.name}"
        return (
            f"{use} must not be test data, and {path} was evaluated as test on {self.date} (task '{self.task}', "
            f"adapter '{self.adapter}'{then})"
        )


def state_folder() -> Path:
    """Return this user's folder for what is kept between runs.

    Raises:
        RuntimeError: the user has no home.
    """
    if own := os.environ.get("ADAPTERMIX_STATE"):
        return Path(own)
    name, usual = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_STATE_HOME", ".local/state")
    return Path(os.environ.get(name) or Path.home() / usual) / "adaptermix"


def _bytes() -> bytes:
    try:
        return (state_folder() / _RECORD).read_bytes()
    except (OSError, RuntimeError):
        return b""


def _entries(content: bytes) -> list[Evaluated]:
    found = []
    for line in content.splitlines():
        try:
            entry = json.loads(line)
            found.append(Evaluated(**{field.name: str(entry[field.name]) for field in fields(Evaluated)}))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def read_record() -> dict[str, Evaluated]:
    """Return for each file, by the hash of its lines, when it was first evaluated as test data."""
    return {entry.text: entry for entry in reversed(_entries(_bytes()))}


def text_hash(file: DataFile) -> str:
    """Return the hash of a file's lines, unpacked, without their ends and without blank ones at its end.

    A data set of the Hub is known by what its entry of a manifest says.
    """
    if type(file) is not DataFile:
        return str(file.entry()["sha256"])
    status = file.path.stat()
    return _hash_of_lines(file.path.absolute(), (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1024)
def _hash_of_lines(path: Path, _status: tuple[int, int, int]) -> str:
    """Return the hash of a file's lines; one that is asked for many times, by each candidate, is read once."""
    digest, blank = hashlib.sha256(), 0
    for _, line in DataFile(path=path, languages=()).lines():
        if line.strip():
            digest.update(b"\n" * blank + line.rstrip().encode() + b"\n")
        blank = 0 if line.strip() else blank + 1
    return digest.hexdigest()


def add_to_record(files: Sequence[DataFile], *, task: str, adapter: str, watch: Watcher) -> None:
    """Record files that were evaluated as test data; where the record cannot be written a person is told.

    Args:
        files: The files.
        task: Name of the task.
        adapter: Name of the adapter, or `base`.
        watch: Told where the record is when it gets new files, and of a failure.
    """
    content = _bytes()
    known = _entries(content)
    day = datetime.now(UTC).date().isoformat()
    found = [
        Evaluated(
            sha256=str(file.entry()["sha256"]),
            text=text_hash(file),
            name=file.path.name,
            task=task,
            adapter=adapter,
            date=day,
        )
        for file in files
    ]
    lines = [json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in found if entry not in known]
    if not lines:
        return
    text = "\n" * (content[-1:] not in (b"", b"\n")) + "".join(lines)  # a line that was cut stays by itself
    try:
        folder = state_folder()
        folder.mkdir(parents=True, exist_ok=True)
        # one write at the file's end, so that lines of several processes do not mix
        with (folder / _RECORD).open("ab", buffering=0) as file:
            file.write(text.encode())
    except (OSError, RuntimeError) as error:
        watch.note(
            f"warning: the record of test data must be writable, and is not ({error}): later use of these files for "
            "choosing or training is not refused. Set ADAPTERMIX_STATE to another folder."
        )
        return
    new = {entry.text for entry in found} - {entry.text for entry in known}
    if new:
        watch.note(
            f"{len(new)} of the files are now recorded as test data in {folder / _RECORD}; choosing or training on "
            "them is refused from here on."
        )


def refuse_tested(
    uses: Mapping[str, Sequence[DataFile]],
    *,
    allowed: bool,
    instead: str = "pass --allow-tested to take it all the same",
) -> list[dict[str, Any]]:
    """Refuse files that were evaluated as test data, or return what a manifest says of them where they are allowed.

    Args:
        uses: Files by what they are to be, such as `DEV`.
        allowed: Whether they are taken all the same.
        instead: What else a person can do than give other data.

    Raises:
        PlanError: a file was evaluated as test data, and is not allowed.
    """
    known = read_record()
    found = [(use, file) for use, files in uses.items() for file in files if known]  # to hash a file is to read it
    keys = [text_hash(file) for _, file in found]
    seen = [(known[key], use, file) for key, (use, file) in zip(keys, found, strict=True) if key in known]
    if seen and not allowed:
        evaluated, use, file = seen[0]
        raise PlanError(f"{evaluated.fault(use, file.path)}. Give other data, or {instead}.")
    return [file.entry() for _, _, file in seen]


def check_split(
    files: Sequence[DataFile], sources: Sequence[AdapterSource], *, split: str | None, watch: Watcher
) -> None:
    """Check what the files of an evaluation are for, against the record and what the adapters have seen.

    Args:
        files: The files.
        sources: The adapters.
        split: What they are for: dev, test, or not told; then a person is warned where test data would be refused.
        watch: Told of files that an adapter was trained or chosen on.

    Raises:
        PlanError: dev data were evaluated as test data before, or an adapter was trained or chosen on test data.
    """
    if split == "dev":
        refuse_tested({DEV: files}, allowed=False, instead="drop --split dev")
    for file in _among(files, manifest.seen(sources)):
        if split == "test":
            raise PlanError(
                f"test data must be new to the adapter, and {file.path} is a file that one here was trained or chosen "
                "on (by its content, whichever rows). Give other data, or drop --split test."
            )
        watch.note(
            f"warning: {file.path} is a file that an adapter was trained or chosen on; unless --rows picks other "
            "rows, scores on it say little."
        )


def told_trained(files: Sequence[DataFile], sources: Sequence[AdapterSource]) -> list[str]:
    """Return what a person should know of dev files that an adapter was trained on."""
    return [
        f"warning: {file.path} is a file that an adapter was trained on; unless --rows picks other rows, the choice "
        "favours what it has learned by heart."
        for file in _among(files, manifest.seen(sources, ("data",)))
    ]


def _among(files: Sequence[DataFile], hashes: set[str]) -> list[DataFile]:
    return [file for file in files if file.entry()["sha256"] in hashes] if hashes else []


def contents(argument: str) -> dict[str, str]:
    """Return the paths of a `FILE` argument by the hash of their text.

    What is not there yet, or lies on the Hub, is known by its name alone, so that nothing is loaded.
    """
    try:
        files = find_files([argument])
    except DataError:
        path = str(Path(argument.rpartition("=")[2]))
        return {path: path}
    return {text_hash(file) if type(file) is DataFile else str(file.path): str(file.path) for file in files}
