"""Steps of recipes that are run once, whoever needs them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..commands.recipes import Step, going_on
from ..commands.step_record import fingerprint_of_id
from ..errors import OutputError
from ..io.disk import sync, sync_tree
from ..io.files import beside, has_edited_card, listed_files, partial_path, real_path, write_whole
from ..options import Settings
from ..options.paths import digest, paths_of, written_paths
from ..options.roles import Reads, Role, Writes, marked, marks_of, values_of
from ..progress import SILENT, Watcher
from .pruning import Curve, Listener, Report, Stopped, unheard
from .report import Pruned, shown

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
        self._left: dict[str, list[str]] = {}
        self._digests: dict[str, str] = {}
        if self._path.exists():
            record = _record(self._path)
            self._done, self._made, self._left = record["steps"], record["outputs"], record["files"]
            self._digests = record["digests"]
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
                self._clear(target, key, steps)
            known = self._done.get(key)
            onward = _counting_from(start, report)
            if known is None or not self._serves(known, target):
                known = self._work(step, key, Curve(like), onward)
                ran += 1
            elif "looks" in known:
                Curve(**known["looks"]).tell(onward)
            if target is not None:
                self._made[target] = key
                self._left[target] = _names(Path(target))
                self._digests[target] = digest(Path(target)) if Path(target).exists() else ""
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
        record = {**self._asked, "steps": self._done, "outputs": self._made, "files": self._left}
        record["digests"] = self._digests
        write_whole(self._path, (json.dumps(record, indent=1) + "\n").encode())

    def _clear(self, target: str, key: str, steps: Sequence[Step]) -> None:
        """Remove what stands in the place of this step's output: of other settings, or not in the record yet.

        Raises:
            OutputError: it is no output of this search, or holds a file that no step wrote.
        """
        place = Path(target)
        if self._made.get(target) == key or not os.path.lexists(place):
            return
        written = {str(real_path(path)) for step in steps for path in written_paths(step.settings)}
        own = {*self._left.get(target, ()), *(listed_files(place) or ())}
        others = [name for name in _names(place) if name not in own and str(real_path(place / name)) not in written]
        others += ["an edited README.md"] if has_edited_card(place) else []
        if place.is_symlink() or not place.is_dir() or others:
            raise OutputError(
                f"a search replaces only outputs of its own steps, and {target} {'holds' if others else 'is'} "
                f"{repr(others[0]) if others else 'a file or a link'}. Move it away, or give another --out."
            )
        shutil.rmtree(place)

    def _bring(self, source: str, target: str) -> bool:
        """Put an earlier output where this candidate expects it; return whether it was still there, as it was made."""
        here, there = Path(target), Path(source)
        if here.exists():
            if self._is_whole(target) and self._is_changed(target):
                raise OutputError(
                    f"{target} must be as its step left it, and was changed since. Move it away, or give another --out."
                )
            return self._is_whole(target)
        if not there.exists() or not self._is_whole(source) or self._is_changed(source):
            return False
        here.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(here, "copy")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(there, partial, symlinks=True)
        sync_tree(partial)
        partial.replace(here)
        sync(here.parent)
        return True

    def _is_whole(self, target: str) -> bool:
        """Return whether all files of an output are there still."""
        return set(self._left.get(target, ())) <= set(_names(Path(target)))

    def _is_changed(self, target: str) -> bool:
        """Return whether somebody changed the content of an output."""
        return self._digests.get(target) not in (None, digest(Path(target)))


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
    own = {"trials", "trials.log"}
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
        found.append((_key(step, folder, made), _key(step, folder, made, only=marked(step.settings, Role.DEV_CURVE))))
        if target := getattr(step.settings, "out", None):
            made[target] = found[-1][0]
    return found


def _names(folder: Path) -> list[str]:
    """Return all files in a folder, and the links, by relative path."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _record(path: Path) -> dict[str, Any]:
    """Read the record of a search.

    Raises:
        OutputError: it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = {**record, **{name: dict(record[name]) for name in ("steps", "outputs", "files")}}
        found["digests"] = dict(record.get("digests", {}))  # of records of earlier versions there are none
        if not all(
            isinstance(entry, dict) and ("document" in entry or "pruned" in entry) for entry in found["steps"].values()
        ):
            raise ValueError("a step has no document")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise OutputError(
            f"{path} must be the record of a search over a recipe, and is not ({error}). Give another --out."
        ) from error
    return found


def _key(step: Step, folder: Path, made: Mapping[str, str], only: set[str] | None = None) -> str:
    """Return what decides a step's result: its settings, the files it reads, the keys of the steps it builds on."""
    files = marks_of(step.settings, Writes)
    without_effect = {*marked(step.settings, Role.HANDLING), *(name for name in files if files[name].form is None)}
    settings = step.settings.model_dump(mode="json", include=only, exclude=without_effect)
    text = json.dumps(settings, sort_keys=True)
    for path in sorted(made, key=len, reverse=True):
        text = text.replace(json.dumps(path)[1:-1], made[path])
    # files beside an adapter are not copied from another candidate, so such a step is the candidate's own
    if not any(settings.get(name) for name in files):
        text = text.replace(json.dumps(str(folder))[1:-1], "${out}")
    inputs = _files(step.settings, folder, only)
    return hashlib.sha256(f"{step.command} {text} {inputs}".encode()).hexdigest()


def _files(settings: Settings, folder: Path, only: set[str] | None) -> list[tuple[str, str | None]]:
    """Return name and content hash of the files and folders outside the candidate's folder that a step reads."""
    found: list[tuple[str, str | None]] = []
    names = [name for name in marks_of(settings, Reads) if only is None or name in only]
    for argument in values_of(settings, names):
        paths = paths_of(argument)
        outside = [path for path in paths if not real_path(path).is_relative_to(real_path(folder))]
        found += [(str(path), digest(path)) for path in outside]
        if not paths and (weights := fingerprint_of_id(argument)):
            found.append((argument, weights))
    return found
