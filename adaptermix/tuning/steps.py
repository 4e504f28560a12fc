"""Steps of recipes that are run once, whoever needs them."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import LOCK, partial_path, write_whole
from ..progress import SILENT, Watcher
from ..recipes import Step, going_on
from .pruning import SAME, Curve, Listener, Report, Stopped, unheard
from .result import Pruned, shown

_WHERE = {"out", "overwrite", "resume", "dry_run"}
_DONE = "steps.json"
_ASKED = ("vary", "recipe", "sampler", "seed", "prune")

StepRunner = Callable[[Step, Watcher], dict[str, Any]]
"""Runs a step, tells a watcher of it, and returns its document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the steps of a candidate came to.

    Args:
        document: The last step's; empty if it was not reached.
        ran: How many were run.
        pruned: Where training was stopped, if it was.
    """

    document: Mapping[str, Any]
    ran: int
    pruned: Pruned | None = None


class Steps:
    """Documents of the steps that were run in a folder, by what decides them, so that none is run twice.

    Args:
        out: The folder.
        asked: What the search varies, and what proposes it.
        run: Runs a step.
        prune: Whether training that is behind is stopped.
        watch: Receives progress.

    Raises:
        OutputError: the folder holds another search.
    """

    def __init__(
        self, out: Path, asked: Mapping[str, Any], run: StepRunner, *, prune: bool = False, watch: Watcher = SILENT
    ) -> None:
        self._path, self._run, self._prune, self._watch = out / _DONE, run, prune, watch
        self._asked = asked = json.loads(json.dumps(asked))
        self._done: dict[str, dict[str, Any]] = {}
        self._made: dict[str, str] = {}
        if self._path.exists():
            record = json.loads(self._path.read_text(encoding="utf-8"))
            self._done, self._made = record["steps"], record["outputs"]
            before = {name: record[name] for name in _ASKED if name in record}
            if before.pop("recipe", None) not in (None, asked["recipe"]):
                watch.note(
                    "warning: the recipe, or values of its variables, changed since this folder was begun: steps that "
                    "are others now run again, and replace what was there."
                )
            rest = {key: value for key, value in asked.items() if key != "recipe"}
            if before and before != rest:  # its numbered folders would be given to other candidates
                raise OutputError(
                    f"{out} holds the search of {_told(before)}, and another one is asked for ({_told(asked)}). Go on "
                    "with that one, or give another --out."
                )
        else:
            self._save()

    def run(self, steps: Sequence[Step], folder: Path, report: Report = unheard) -> Outcome:
        """Run what is missing of a candidate's steps.

        Args:
            steps: The steps.
            folder: Where they write.
            report: Is told of looks at dev data; the steps of a training are counted on from the one before.
        """
        ran, start = 0, 0
        document: dict[str, Any] = {}
        for step, (key, like) in zip(steps, identities(steps, folder), strict=True):
            target = getattr(step.settings, "out", None)
            if target is not None:
                self._clear(target, key)
            known = self._done.get(key)
            onward = _counting_from(start, report)
            if known is None or not self._serves(known, target):
                known = self._work(step, key, Curve(like), onward)
                ran += 1
            elif "looks" in known:
                Curve(**known["looks"]).tell(onward)
            if target is not None:
                self._made[target] = key
            self._save()
            if "pruned" in known:
                return Outcome(document={}, ran=ran, pruned=Pruned(**known["pruned"]))
            document = known["document"]
            start += known["looks"]["looks"][-1][0] if "looks" in known else 0
        return Outcome(document=document, ran=ran)

    def _work(self, step: Step, key: str, curve: Curve, report: Report) -> dict[str, Any]:
        """Run a step and return its entry; of one that was stopped nothing else stays."""
        target = getattr(step.settings, "out", None)
        earlier = [Curve(**entry["looks"]) for entry in self._done.values() if "looks" in entry]
        # what was run whole before, and is gone, is run whole again
        others = earlier if self._prune and key not in self._done else []
        entry: dict[str, Any] = {"out": target}
        try:
            entry["document"] = self._run(going_on(step), Listener(self._watch, step.command, curve, others, report))
        except Stopped as stopped:
            if target is not None:
                shutil.rmtree(partial_path(Path(target).absolute()), ignore_errors=True)
            entry["pruned"] = stopped.pruned.document()
        if self._prune and len(curve.looks) == 1 and not earlier:
            self._watch.note(
                f"{step.command} looked at dev data once, and its first look stops nothing: set evaluate_every."
            )
        if curve.looks:
            entry["looks"] = curve.document()
        self._done[key] = entry
        return entry

    def _serves(self, known: Mapping[str, Any], target: str | None) -> bool:
        """Return whether what is known of a step will do, its output in place."""
        if "pruned" in known:
            return self._prune
        return target is None or self._bring(known["out"], target)

    def _save(self) -> None:
        record = {**self._asked, "steps": self._done, "outputs": self._made}
        write_whole(self._path, (json.dumps(record, indent=1) + "\n").encode())

    def _clear(self, target: str, key: str) -> None:
        """Remove what stands in the place of this step's output: of other settings, or not in the record yet."""
        if self._made.get(target) != key:
            shutil.rmtree(target, ignore_errors=True)

    @staticmethod
    def _bring(source: str, target: str) -> bool:
        """Put an earlier output where this candidate expects it; tell whether it was still there."""
        here, there = Path(target), Path(source)
        if here.exists():
            return True
        if not there.exists():
            return False
        here.parent.mkdir(parents=True, exist_ok=True)
        partial = here.with_name(f".{here.name}.copy")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(there, partial, symlinks=True)
        partial.replace(here)
        return True


def _counting_from(start: int, report: Report) -> Report:
    return lambda step, value: report(start + step, value)


def _told(asked: Mapping[str, Any]) -> str:
    more = {name: value for name, value in asked.items() if name not in ("vary", "recipe")}
    return shown({**asked["vary"], **more})


def check_place(out: Path) -> None:
    """Refuse a folder of something else.

    Raises:
        OutputError: it holds files, and is not of such a search.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out must be a folder, and {out} is a file. Give another.")
    own = {LOCK, "trials", "trials.log"}
    others = [path for path in out.iterdir() if path.name not in own] if out.is_dir() else []
    if others and not (out / _DONE).exists():
        raise OutputError(f"--out must be new, or the folder of such a search, and {out} holds other files.")


def identities(steps: Sequence[Step], folder: Path) -> list[tuple[str, str]]:
    """Return what decides the result of each step, and what looks at its training must share to be compared.

    Args:
        steps: The steps of a candidate.
        folder: Where they write.
    """
    made: dict[str, str] = {}
    found = []
    for step in steps:
        found.append((_key(step, folder, made), _key(step, folder, made, only=SAME)))
        if target := getattr(step.settings, "out", None):
            made[target] = found[-1][0]
    return found


def _key(step: Step, folder: Path, made: Mapping[str, str], only: set[str] | None = None) -> str:
    """Return what decides a step's result: its settings, the files it reads, the keys of the steps it builds on."""
    settings = step.settings.model_dump(mode="json", include=only, exclude=_WHERE)
    text = json.dumps(settings, sort_keys=True)
    for path in sorted(made, key=len, reverse=True):
        text = text.replace(json.dumps(path)[1:-1], made[path])
    # files beside an adapter are not copied from another candidate, so such a step is the candidate's own
    if not any(settings.get(name) for name in ("predictions", "plot", "csv", "markdown")):
        text = text.replace(json.dumps(str(folder))[1:-1], "${out}")
    return hashlib.sha256(f"{step.command} {text} {_files(settings, folder)}".encode()).hexdigest()


def _files(value: Any, folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of the files outside the candidate's folder that a setting names, also as a folder."""
    if isinstance(value, dict):
        return [entry for item in value.values() for entry in _files(item, folder)]
    if isinstance(value, list):
        return [entry for item in value for entry in _files(item, folder)]
    if not isinstance(value, str) or Path(value).is_relative_to(folder):
        return []
    paths = sorted(glob.glob(value)) or sorted(glob.glob(value.partition("=")[2]))
    inside = [sorted(map(str, Path(path).iterdir())) if Path(path).is_dir() else [path] for path in paths]
    found = [(path, os.stat(path)) for path in itertools.chain(*inside) if Path(path).is_file()]
    return [(path, status.st_size, status.st_mtime_ns) for path, status in found]
