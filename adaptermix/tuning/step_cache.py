"""Steps of recipes that run once for all candidates that need them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..commands.recipe_file import Step
from ..commands.recipes import going_on
from ..commands.step_record import fingerprint_of_id
from ..errors import OutputError
from ..io.disk import sync, sync_tree
from ..io.files import has_edited_card, hidden_path, listed_files, partial_path, real_path, write_whole
from ..io.json_types import JsonObject
from ..options import Settings
from ..options.paths import digest, paths_of, written_paths
from ..options.roles import Reads, Role, Writes, marked, marks_of, values_of
from ..progress import SILENT, Watcher
from .pruning import Curve, PruningWatcher, Report, Stopped, ignore
from .report import Pruned, label_of

_RECORD = "steps.json"
_IDENTITY = ("vary", "recipe", "sampler", "seed", "prune")

Parsed = Mapping[str, Any]
"""A document of a step, or an object of the record of steps, which `_read_record` checks."""
StepRunner = Callable[[Step, Watcher], JsonObject]
"""Runs a step, reports its progress to a watcher, and returns its document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The documents of the steps that were reached, the number of steps that ran, and where one stopped."""

    documents: Sequence[Parsed]
    ran: int
    pruned: Pruned | None = None


class StepCache:
    """Documents of the steps that ran in a folder, by their key, so that none runs twice.

    Args:
        out: The folder.
        identity: The search that the folder belongs to.
        run: Runs a step.
        prune: Whether to stop training whose dev results are worse than those of earlier candidates.
        watch: Receives progress.

    Raises:
        OutputError: the folder belongs to another search.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, object],
        run: StepRunner,
        *,
        prune: bool = False,
        watch: Watcher = SILENT,
    ) -> None:
        self._path, self._run, self._prune, self._watch = out / _RECORD, run, prune, watch
        self._identity = identity = json.loads(json.dumps(identity))
        self._entries: dict[str, Parsed] = {}  # By the key of a step.
        self._keys: dict[str, str] = {}  # By output: the key of its step.
        self._files: dict[str, list[str]] = {}  # By output: its files.
        self._digests: dict[str, str] = {}  # By output: the hash of its content.
        if not self._path.exists():
            self._save()
            return
        record = _read_record(self._path)
        self._entries, self._keys, self._files = record["steps"], record["outputs"], record["files"]
        self._digests = record["digests"]
        before = {name: record[name] for name in _IDENTITY if name in record}
        if before.pop("recipe", None) not in (None, identity["recipe"]):
            watch.note(
                "warning: the recipe, or values of its variables, changed since this folder was created: steps "
                "that changed run again, and replace their outputs."
            )
        rest = {key: value for key, value in identity.items() if key != "recipe"}
        if before and before != rest:  # The numbered folders would get other candidates.
            raise OutputError(
                f"{out} holds the search of {_described(before)}, not the requested one "
                f"({_described(identity)}). Continue with that one, or give another --out.",
                code="tune.other-search",
            )

    def run(self, steps: Sequence[Step], folder: Path, report: Report = ignore) -> Outcome:
        """Run those steps of a candidate that have not run yet.

        Args:
            steps: The steps.
            folder: Folder of their outputs.
            report: Receives dev results; steps of a training are counted on from those of earlier trainings.
        """
        ran, start = 0, 0
        documents: list[Parsed] = []
        for step, (key, like) in zip(steps, identities(steps, folder), strict=True):
            target = getattr(step.settings, "out", None)
            if target is not None:
                self._clear(target, key, steps)
            entry = self._entries.get(key)
            shifted = _shifted(report, start)
            if entry is None or not self._can_use(entry, target):
                entry = self._work(step, key, Curve(like), shifted)
                ran += 1
            elif "looks" in entry:
                Curve(**entry["looks"]).report(shifted)
            if target is not None:
                self._keys[target] = key
                self._files[target] = _names(Path(target))
                self._digests[target] = digest(Path(target)) if Path(target).exists() else ""
            self._save()
            if "pruned" in entry:
                return Outcome(documents=[], ran=ran, pruned=Pruned(**entry["pruned"]))
            documents.append(entry["document"])
            start += entry["looks"]["looks"][-1][0] if "looks" in entry else 0
        return Outcome(documents=documents, ran=ran)

    def _work(self, step: Step, key: str, curve: Curve, report: Report) -> Parsed:
        """Run a step and return its entry; a stopped one leaves no files."""
        target = getattr(step.settings, "out", None)
        earlier = [Curve(**entry["looks"]) for entry in self._entries.values() if "looks" in entry]
        # A step that finished before, and whose output is missing, is not stopped.
        others = earlier if self._prune and key not in self._entries else []
        watch = PruningWatcher(self._watch, step.command, curve, others, report)
        entry: JsonObject = {"out": target}
        try:
            entry["document"] = self._run(going_on(step), watch)
        except Stopped as stopped:
            if target is not None:
                shutil.rmtree(partial_path(Path(target).absolute()), ignore_errors=True)
            entry["pruned"] = stopped.pruned.document()
        if self._prune and len(curve.looks) == 1 and not earlier:
            self._watch.note(
                f"{step.command} evaluated dev data once, but a first result never stops training: set evaluate_every."
            )
        if curve.looks:
            entry["looks"] = asdict(curve)
        self._entries[key] = entry
        return entry

    def _can_use(self, entry: Parsed, target: str | None) -> bool:
        """Return whether an entry can be used, and put its output in place."""
        if "pruned" in entry:
            return self._prune
        return target is None or self._copy(entry["out"], target)

    def _save(self) -> None:
        record = {**self._identity, "steps": self._entries, "outputs": self._keys, "files": self._files}
        record["digests"] = self._digests
        write_whole(self._path, (json.dumps(record, indent=1) + "\n").encode())

    def _clear(self, target: str, key: str, steps: Sequence[Step]) -> None:
        """Remove an output at this step's path that was made with other settings, or is not in the record yet.

        Raises:
            OutputError: it is not an output of this search, or contains a file that no step wrote.
        """
        path = Path(target)
        if self._keys.get(target) == key or not os.path.lexists(path):
            return
        written = {str(real_path(output)) for step in steps for output in written_paths(step.settings)}
        known = {*self._files.get(target, ()), *(listed_files(path) or ())}
        others = [name for name in _names(path) if name not in known and str(real_path(path / name)) not in written]
        others += ["an edited README.md"] if has_edited_card(path) else []
        if path.is_symlink() or not path.is_dir() or others:
            raise OutputError(
                f"a search replaces only outputs of its steps, and {target} {'holds' if others else 'is'} "
                f"{repr(others[0]) if others else 'a file or a link'}. Move it away, or give another --out.",
                code="tune.other-output",
            )
        shutil.rmtree(path)

    def _copy(self, source: str, target: str) -> bool:
        """Copy an earlier output to this candidate; return whether it still exists, unchanged."""
        here, there = Path(target), Path(source)
        if here.exists():
            if self._is_whole(target) and self._is_changed(target):
                raise OutputError(
                    f"{target} must be as its step left it, and was changed since. Move it away, or give another "
                    "--out.",
                    code="tune.step-changed",
                )
            return self._is_whole(target)
        if not there.exists() or not self._is_whole(source) or self._is_changed(source):
            return False
        here.parent.mkdir(parents=True, exist_ok=True)
        partial = hidden_path(here, "copy")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(there, partial, symlinks=True)
        sync_tree(partial)
        partial.replace(here)
        sync(here.parent)
        return True

    def _is_whole(self, target: str) -> bool:
        return set(self._files.get(target, ())) <= set(_names(Path(target)))

    def _is_changed(self, target: str) -> bool:
        return self._digests.get(target) not in (None, digest(Path(target)))


def _shifted(report: Report, start: int) -> Report:
    return lambda step, value: report(start + step, value)


def _described(identity: Parsed) -> str:
    more = {name: value for name, value in identity.items() if name not in ("vary", "recipe")}
    return label_of({**identity["vary"], **more})


def check_folder(out: Path) -> None:
    """Refuse a folder that does not belong to a search over a recipe.

    Raises:
        OutputError: the folder contains other files.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out must be a folder, and {out} is a file. Give another.", code="output.is-file")
    others = [path for path in out.iterdir() if path.name not in ("trials", "trials.log")] if out.is_dir() else []
    if others and not (out / _RECORD).exists():
        raise OutputError(
            f"--out must be new, or the folder of a search over a recipe, and {out} holds other files.",
            code="tune.out-not-empty",
        )


def identities(steps: Sequence[Step], folder: Path) -> list[tuple[str, str]]:
    """Return for each step of a candidate a key of its result, and a key that comparable training shares.

    Args:
        steps: The steps.
        folder: Folder of their outputs.
    """
    made: dict[str, str] = {}
    keys = []
    for step in steps:
        same = marked(step.settings, Role.DEV_CURVE)
        keys.append((_key(step, folder, made), _key(step, folder, made, only=same)))
        if target := getattr(step.settings, "out", None):
            made[target] = keys[-1][0]
    return keys


def _names(folder: Path) -> list[str]:
    """Return the relative paths of all files and links in a folder."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _read_record(path: Path) -> Parsed:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record = {**record, **{name: dict(record[name]) for name in ("steps", "outputs", "files")}}
        record["digests"] = dict(record.get("digests", {}))  # Earlier versions wrote none.
        entries = record["steps"].values()
        if not all(isinstance(entry, dict) and ("document" in entry or "pruned" in entry) for entry in entries):
            raise ValueError("a step has no document")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise OutputError(
            f"{path} must be the record of a search over a recipe, and is not ({error}). Give another --out.",
            code="tune.record",
        ) from error
    return record


def _key(step: Step, folder: Path, made: Mapping[str, str], only: set[str] | None = None) -> str:
    """Return a hash of a step's settings, the content of its inputs, and the keys of the steps that made inputs."""
    files = marks_of(step.settings, Writes)
    without_effect = {*marked(step.settings, Role.HANDLING), *(name for name in files if files[name].form is None)}
    settings = step.settings.model_dump(mode="json", include=only, exclude=without_effect)
    text = json.dumps(settings, sort_keys=True)
    for path in sorted(made, key=len, reverse=True):
        text = text.replace(json.dumps(path)[1:-1], made[path])
    # Files next to an adapter are not copied from another candidate, so a step that writes some is not shared.
    if not any(settings.get(name) for name in files):
        text = text.replace(json.dumps(str(folder))[1:-1], "${out}")
    inputs = _files(step.settings, folder, only)
    return hashlib.sha256(f"{step.command} {text} {inputs}".encode()).hexdigest()


def _files(settings: Settings, folder: Path, only: set[str] | None) -> list[tuple[str, str | None]]:
    """Return name and content hash of the files and folders outside the candidate's folder that a step reads."""
    files: list[tuple[str, str | None]] = []
    for argument in values_of(settings, [name for name in marks_of(settings, Reads) if only is None or name in only]):
        paths = paths_of(argument)
        outside = [path for path in paths if not real_path(path).is_relative_to(real_path(folder))]
        files += [(str(path), digest(path)) for path in outside]
        if not paths and (weights := fingerprint_of_id(argument)):
            files.append((argument, weights))
    return files
