"""A fault in a command, and the same command again: what is on disk, and what was printed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.factories import contents

from .processes import SIGNALS, Ended, Fault, run

STOPS = tuple(SIGNALS)
_CODES = {
    "none": (0,),
    "kill": (-9, 0),
    "interrupt": (130, 0),
    "interrupt-twice": (130, 0),
    "terminate": (143, 130, 0),  # Training ends with 130 and says how to resume.
    "full": (1, 0),
    "files": (1, 0),
    "memory": (1, 0),
}
_MOST_LINES = 10
_OWN_NAMES = ("state",)

Contents = dict[str, bytes | None]


def _outputs(folder: Path, inputs: Contents) -> Contents:
    """Return all that a command wrote, without the record of test data."""
    there = contents(folder)
    return {name: there[name] for name in there if name not in inputs and name.split("/")[0] not in _OWN_NAMES}


def _hidden(written: Contents) -> list[str]:
    return sorted({name for name in written if any(part.startswith(".") for part in name.split("/"))})


def _is_text(ended: Ended) -> bool:
    is_short = ended.code == 0 or len(ended.text.strip().splitlines()) <= _MOST_LINES
    return "Traceback" not in ended.text and is_short


@dataclass
class Bench:
    """A command in a folder with its inputs, and what it writes when nothing goes wrong.

    Args:
        folder: Folder with the inputs alone.
        arguments: The command.
    """

    folder: Path
    arguments: list[str]

    def __post_init__(self) -> None:
        self.inputs = contents(self.folder)
        first = run(self.arguments, self.folder)
        whole = _outputs(self.folder, self.inputs)
        self.clear()
        second = run(self.arguments, self.folder)
        again = _outputs(self.folder, self.inputs)
        self.clear()
        assert first.code == second.code == 0, first.text + second.text
        assert whole.keys() == again.keys()
        assert whole, "the command writes nothing"
        self.calls, self.seconds = second.calls, second.seconds
        self._whole = {name: content for name, content in whole.items() if content == again[name]}
        self._names = whole.keys()

    def clear(self) -> None:
        """Remove what the command wrote."""
        for path in self.folder.iterdir():
            if path.name not in self.inputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _is_whole(self, written: Contents) -> bool:
        return {name for name in written if not self._is_hidden(name)} == self._names and all(
            written[name] == content for name, content in self._whole.items()
        )

    def _is_hidden(self, name: str) -> bool:
        return any(part.startswith(".") for part in name.split("/")) and name not in self._names

    def _is_part(self, written: Contents) -> bool:
        """Return whether each top-level output is as a whole run writes it, or absent."""
        tops = {name.split("/")[0] for name in written if not self._is_hidden(name)}
        return all(
            not name.startswith(f"{top}/") or name in written for top in tops & {"out"} for name in self._names
        ) and all(name not in written or written[name] == content for name, content in self._whole.items())

    def trial(self, fault: Fault) -> list[str]:
        """Run the command with a fault, then again without, and return what is wrong."""
        ended = run(self.arguments, self.folder, fault)
        wrong = list(self._after_fault(ended, fault))
        if not wrong:
            wrong += self._again()
        if {name: content for name, content in contents(self.folder).items() if name in self.inputs} != self.inputs:
            wrong.append("an input was changed")
        self.clear()
        return wrong

    def _after_fault(self, ended: Ended, fault: Fault) -> Iterator[str]:
        if ended.code not in _CODES[fault.deed]:
            yield f"exit code {ended.code}: {ended.text[-1500:]}"
        if not _is_text(ended):
            yield f"printed {ended.text[-1500:]}"
        written = _outputs(self.folder, self.inputs)
        if ended.code == 0 and not self._is_whole(written):
            yield "exit code 0 without the whole output"
        if not self._is_part(written):
            yield f"half an output: {sorted(written)}"
        left = [name for name in _hidden(written) if "adaptermix-" in name and not name.endswith("-step")]
        if fault.deed != "kill" and left:
            yield f"left behind: {left}"

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
            odd = [name for name, content in self._whole.items() if written.get(name) != content]
            yield f"the next run wrote something else: {odd or sorted(written.keys() ^ self._names)}"
        if left := [name for name in _hidden(written) if name not in self._names]:
            yield f"left behind for ever: {left}"


def stop_faults(bench: Bench, number: int, seed: int) -> list[Fault]:
    """Return signals at random moments and before random file operations, half of each."""
    draw = random.Random(seed)
    faults = []
    for index in range(number):
        deed = STOPS[index % len(STOPS)]
        if index % 2:
            faults.append(Fault(deed=deed, seconds=draw.uniform(0.2, bench.seconds)))
        else:
            faults.append(Fault(deed=deed, call=draw.randint(1, max(1, bench.calls))))
    return faults


def disk_faults(bench: Bench, most: int) -> list[Fault]:
    """Return disks that are full from a file operation on, at every operation or `most` of them evenly spread."""
    if not most:
        return []
    calls = max(1, bench.calls)
    step = max(1, -(-calls // most))
    return [Fault(deed="full", call=call, size=0 if call % 2 else 300) for call in range(1, calls + 1, step)]
