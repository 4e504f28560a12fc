"""A fault in a command, and the same command again: what is on disk, and what was printed."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.factories import contents

from .processes import BALLAST, SIGNALS, TOKEN, Ended, Fault, run

STOPS = tuple(SIGNALS)
_CODES = {
    "none": (0,),
    "kill": (-9, 0),
    "interrupt": (130, 0),
    "interrupt-twice": (130, 0),
    "terminate": (130, 0),
    "full": (1, 0),
    "fill": (1, 0),
    "files": (1, 0),
    "memory": (1, 0, -signal.SIGABRT),  # Libraries in Rust and C++ end the process if they get no memory.
    "read-only": (1, 0),
    "two": (1, 0),
}
_MOST_LINES = 10
_OWN_NAMES = ("state", "tmp", BALLAST)

Contents = dict[str, bytes | None]


def _outputs(folder: Path, inputs: Contents) -> Contents:
    """Return all that a command wrote, without the record of test data and temporary files."""
    there = contents(folder)
    return {name: there[name] for name in there if name not in inputs and name.split("/")[0] not in _OWN_NAMES}


def _comparable(name: str, content: bytes | None) -> object:
    """Return a file's content without what records how often a search was stopped."""
    if name.endswith("results.json") and content:
        return _without(json.loads(content), ("number", "ran"))
    return content


def _without(value: object, keys: tuple[str, ...]) -> object:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _temporary(folder: Path) -> list[str]:
    """Return the temporary files of adaptermix; other libraries leave some of their own."""
    return sorted(path.name for path in (folder / "tmp").glob("adaptermix-*"))


def _is_text(ended: Ended) -> bool:
    is_short = ended.code == 0 or len(ended.text.strip().splitlines()) <= _MOST_LINES
    return "Traceback" not in ended.text and is_short


@dataclass
class Bench:
    """A command in a folder with its inputs, and what it writes when nothing goes wrong.

    Args:
        folder: Folder with the inputs alone.
        arguments: The command.
        outputs: The outputs that appear whole or not at all; none if the command writes temporary files only.
        varies: Two runs write different bytes, so that only the names of files are compared.
    """

    folder: Path
    arguments: list[str]
    outputs: tuple[str, ...] = ("out",)
    varies: bool = False

    def __post_init__(self) -> None:
        self.clear(remove=_OWN_NAMES)
        self.inputs = contents(self.folder)
        first = run(self.arguments, self.folder)
        whole = _outputs(self.folder, self.inputs)
        self.clear()
        second = run(self.arguments, self.folder)
        again = _outputs(self.folder, self.inputs)
        self.clear()
        assert first.code == second.code == 0, first.text + second.text
        assert whole.keys() == again.keys()
        assert bool(whole) == bool(self.outputs), sorted(whole)
        self.calls, self.seconds = second.calls, second.seconds
        same = {} if self.varies else {name: whole[name] for name in whole if whole[name] == again[name]}
        self._whole = {name: _comparable(name, content) for name, content in same.items()}
        self._names = whole.keys()

    def clear(self, remove: tuple[str, ...] = ()) -> None:
        """Remove what the command wrote.

        Args:
            remove: Names to remove; those that are not inputs if none.
        """
        for path in self.folder.iterdir():
            if path.name in remove or (not remove and path.name not in self.inputs):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _is_whole(self, written: Contents) -> bool:
        return {name for name in written if not self._is_left(name)} == self._names and all(
            _comparable(name, written[name]) == content for name, content in self._whole.items()
        )

    def _is_left(self, name: str) -> bool:
        return _is_hidden(name) and name not in self._names

    def _is_part(self, written: Contents) -> bool:
        """Return whether each output is as a whole run writes it, or absent."""
        there = {out for out in self.outputs if any(name == out or name.startswith(f"{out}/") for name in written)}
        return all(name in written for name in self._names for out in there if name.startswith(f"{out}/")) and all(
            name not in written or _comparable(name, written[name]) == content for name, content in self._whole.items()
        )

    def trial(self, fault: Fault) -> list[str]:
        """Run the command with a fault, then again without, and return what is wrong."""
        whole = self._whole
        if fault.deed == "memory":  # Libraries choose other algorithms, whose results differ in their last bits.
            self._whole = {}
        wrong = []
        for ended in self._with_fault(fault):
            wrong += self._after_fault(ended, fault)
        (self.folder / BALLAST).unlink(missing_ok=True)
        if not wrong:
            wrong += self._again()
        if {name: content for name, content in contents(self.folder).items() if name in self.inputs} != self.inputs:
            wrong.append("an input was changed")
        self.clear()
        self._whole = whole
        return [f"{fault}: {text}" for text in wrong]

    def _with_fault(self, fault: Fault) -> list[Ended]:
        """Return how the command ended: once, or twice if it ran twice at once."""
        if fault.deed == "two":
            with ThreadPoolExecutor(2) as pool:
                ended = list(pool.map(lambda _: run(self.arguments, self.folder), range(2)))
            return sorted(ended, key=lambda each: each.code, reverse=True)[: 1 if ended[0].code or ended[1].code else 2]
        if fault.deed == "read-only":
            for name in ("state", "tmp"):
                (self.folder / name).mkdir(exist_ok=True)
            self.folder.chmod(0o555)
            try:
                return [run(self.arguments, self.folder, fault)]
            finally:
                self.folder.chmod(0o755)
        return [run(self.arguments, self.folder, fault)]

    def _after_fault(self, ended: Ended, fault: Fault) -> Iterator[str]:
        written = _outputs(self.folder, self.inputs)
        if ended.code not in _CODES[fault.deed]:
            yield f"exit code {ended.code}: {ended.text[-1500:]}"
        if not _is_text(ended):
            yield f"printed {ended.text[-1500:]}"
        if TOKEN in ended.text or any(TOKEN.encode() in (content or b"") for content in written.values()):
            yield "the token was printed or written"
        if ended.code == 0 and not self._is_whole(written):
            yield "exit code 0 without the whole output"
        if not self._is_part(written):
            yield f"half an output: {sorted(written)}"
        left = [name for name in written if _is_hidden(name) and "adaptermix-" in name and not name.endswith("-step")]
        if ended.code >= 0 and (left or _temporary(self.folder)):
            yield f"left behind: {left}, {_temporary(self.folder)}"

    def _again(self) -> Iterator[str]:
        """Run the same command until it has nothing more to do."""
        was_there = self._is_whole(_outputs(self.folder, self.inputs))
        ended = run(self.arguments, self.folder)
        if ended.code == 1 and "--resume" in ended.text:
            ended = run([*self.arguments, "--resume"], self.folder)
        if not _is_text(ended):
            yield f"the next run printed {ended.text[-1500:]}"
        written = _outputs(self.folder, self.inputs)
        exists = ended.code == 1 and was_there and ("exists" in ended.text or "replace" in ended.text)
        if ended.code != 0 and not exists:
            yield f"the next run ended with {ended.code}: {ended.text[-1500:]}"
        elif not self._is_whole(written):
            odd = [name for name, content in self._whole.items() if _comparable(name, written.get(name)) != content]
            yield f"the next run wrote something else: {odd or sorted(written.keys() ^ self._names)}"
        if exists and any(map(self._is_left, written)):  # Killed between writing the output and removing the rest.
            run([*self.arguments, "--overwrite"], self.folder)
            written = _outputs(self.folder, self.inputs)
        if left := [*filter(self._is_left, written), *_temporary(self.folder)]:
            yield f"left behind for ever: {left}"


def stop_faults(bench: Bench, number: int, seed: int) -> list[Fault]:
    """Return signals at random moments and before random file operations, half of each."""
    draw = random.Random(seed)
    faults = []
    for index in range(number):
        deed = STOPS[index % len(STOPS)]
        if index % 2 or not bench.calls:
            faults.append(Fault(deed=deed, seconds=draw.uniform(0.1, max(0.2, bench.seconds))))
        else:
            faults.append(Fault(deed=deed, call=draw.randint(1, bench.calls)))
    return faults


def disk_faults(bench: Bench, most: int, *, fill: bool) -> list[Fault]:
    """Return disks that are full from a file operation on, at every operation or `most` of them evenly spread.

    Args:
        bench: The command.
        most: Number of operations.
        fill: Fill the disk; else files cannot grow beyond 0 or 300 bytes.
    """
    if not most or not bench.calls:
        return []
    step = max(1, -(-bench.calls // most))
    return [
        Fault(deed="fill", call=call) if fill else Fault(deed="full", call=call, size=0 if call % 2 else 300)
        for call in range(1, bench.calls + 1, step)
    ]


def limit_faults(number: int, seed: int) -> list[Fault]:
    """Return limits of memory and of open files, a read-only folder, and two processes on one output."""
    if not number:
        return []
    draw = random.Random(f"limits {seed}")
    memory = [Fault(deed="memory", size=int(2 ** draw.uniform(20, 31))) for _ in range(number)]
    files = [Fault(deed="files", size=draw.randint(8, 40)) for _ in range(number)]
    return [*memory, *files, Fault(deed="read-only"), Fault(deed="two")]
