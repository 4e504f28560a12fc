"""Settings of training as parameters of a search: a recipe is run once per candidate, and its last step judges.

What a candidate has in common with an earlier one is not run again: a step is known by its settings and by the steps
that made its inputs.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, OutputError
from .files import write_whole
from .progress import SILENT, Watcher
from .recipes import Runner, Step, check_splits, going_on, load_recipe, run_step
from .settings import EvaluateSettings

_JUDGES = {"search": lambda document: document["best"], "evaluate": lambda document: document["overall"]}
_WHERE = {"out", "overwrite", "resume", "dry_run"}
_DONE = "steps.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice of settings and what it scored.

    Args:
        settings: Overrides of the recipe.
        folder: What its steps wrote.
        value: Score of the last step.
        low: Lower end of its 95 % interval.
        high: Upper end.
        ran: Steps that were run for it; the others were there already.
    """

    settings: Mapping[str, Any]
    folder: Path
    value: float
    low: float
    high: float
    ran: int

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "settings": dict(self.settings),
            "folder": str(self.folder),
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "ran": self.ran,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """All candidates.

    Args:
        candidates: In the order in which they ran.
        best: The one of the highest value, the first among equals.
        out: The folder of all.
    """

    candidates: Sequence[Candidate]
    best: Candidate
    out: Path

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "best": self.best.document(),
            "trials": [candidate.document() for candidate in self.candidates],
            "out": str(self.out),
        }


class Steps:
    """Documents of the steps that were run in a folder, by what decides them, so that none is run twice.

    Args:
        out: The folder.
        vary: What the search varies.
        run: Runs a step.

    Raises:
        OutputError: the folder holds another search.
    """

    def __init__(self, out: Path, vary: Mapping[str, Sequence[Any]], run: Runner) -> None:
        self._path, self._run = out / _DONE, run
        self._vary = vary = json.loads(json.dumps(vary))
        self._done: dict[str, dict[str, Any]] = {}
        self._made: dict[str, str] = {}
        if self._path.exists():
            record = json.loads(self._path.read_text(encoding="utf-8"))
            self._done, self._made = record["steps"], record["outputs"]
            if record.get("vary", vary) != vary:  # its numbered folders would be given to other candidates
                raise OutputError(
                    f"{out} holds the search of {shown(record['vary'])}, and another one is asked for "
                    f"({shown(vary)}). Go on with that one, or give another --out."
                )

    def run(self, steps: Sequence[Step], folder: Path) -> tuple[dict[str, Any], int]:
        """Run what is missing of a candidate's steps; return the last one's document and the count of those run."""
        made: dict[str, str] = {}
        ran = 0
        document: dict[str, Any] = {}
        for step in steps:
            key = _key(step, folder, made)
            target = getattr(step.settings, "out", None)
            if target is not None:
                self._clear(target, key)
                made[target] = key
            known = self._done.get(key)
            if known is None or (target and not self._bring(known["out"], target)):
                document = self._run(going_on(step))
                self._done[key] = {"out": target, "document": document}
                ran += 1
            else:
                document = known["document"]
            if target is not None:
                self._made[target] = key
            self._save()
        return document, ran

    def _save(self) -> None:
        record = {"vary": self._vary, "steps": self._done, "outputs": self._made}
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


def _key(step: Step, folder: Path, made: Mapping[str, str]) -> str:
    """Return what decides a step's result: its settings, the files it reads, the keys of the steps it builds on."""
    settings = step.settings.model_dump(mode="json", exclude=_WHERE)
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


def shown(settings: Mapping[str, Any]) -> str:
    """Return a candidate's settings for a person."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def candidates(vary: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return all combinations of the values of each setting, the last setting changing fastest.

    Example:
        >>> candidates({"a": [1, 2], "b": [3]})
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def plan(
    recipe: Path, vary: Mapping[str, Sequence[Any]], out: Path, overrides: Mapping[str, Any] | None = None
) -> list[tuple[dict[str, Any], Path, list[Step]]]:
    """Check every candidate's recipe and return its settings, its folder and its steps.

    Raises:
        ConfigError: the recipe has faults with some candidate, has no variable `out`, or ends in no step that judges on
            dev data.
    """
    if "out" in (overrides or {}):
        raise ConfigError("the variable out is the candidates' own here. Give --out instead.")
    chosen = []
    for number, settings in enumerate(candidates(vary), start=1):
        folder = out / "trials" / str(number)
        steps = load_recipe(recipe, {**(overrides or {}), **settings, "out": str(folder)})
        if steps[-1].command not in _JUDGES:
            raise ConfigError(
                f"{recipe}: the last step must be {' or '.join(_JUDGES)}, on dev data: its score decides; found "
                f"{steps[-1].command!r}."
            )
        steps[-1] = _judge(recipe, steps[-1])
        check_splits(recipe, steps)
        elsewhere = [step for step in steps if not _within(step, folder)]
        if elsewhere:
            raise ConfigError(
                f"{recipe}: every output must lie in ${{out}}, and that of {elsewhere[0].command} does not, so that "
                "candidates would overwrite each other."
            )
        chosen.append((settings, folder, steps))
    return chosen


def _judge(recipe: Path, step: Step) -> Step:
    """Return the last step, whose data are dev data."""
    if not isinstance(step.settings, EvaluateSettings):
        return step
    if step.settings.split == "test":
        raise ConfigError(f"{recipe}: the last step must be on dev data: its score decides; found split: test.")
    return Step(command=step.command, settings=step.settings.model_copy(update={"split": "dev"}))


def _within(step: Step, folder: Path) -> bool:
    target = getattr(step.settings, "out", None)
    return target is None or Path(target).is_relative_to(folder)


def tune(
    recipe: str | Path,
    vary: Mapping[str, Sequence[Any]],
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    run: Runner | None = None,
    watch: Watcher = SILENT,
) -> Tuning:
    """Run a recipe for every combination of settings and find the best by its last step, on dev data.

    What was done stays in `out`, so the same call goes on after an interruption.

    Args:
        recipe: The YAML file; its outputs lie in `${out}`, and its last step is `search` or `evaluate` on dev data.
        vary: Values to try of variables, or of settings as `command.setting`.
        out: Folder of all candidates and of `results.json`.
        overrides: Values that all candidates share.
        run: What runs a step; default the library's own calls.
        watch: Receives progress.

    Raises:
        AdapterMixError: the recipe has faults, or a step failed; what was done before it stays.
    """
    out = Path(out)
    planned = plan(Path(recipe), vary, out, overrides)
    out.mkdir(parents=True, exist_ok=True)
    steps_of = Steps(out, vary, run or (lambda step: run_step(step, watch=watch)))
    found = []
    for number, (settings, folder, steps) in enumerate(planned, start=1):
        watch.note(f"candidate {number} of {len(planned)}: {shown(settings)}")
        document, ran = steps_of.run(steps, folder)
        score = _JUDGES[steps[-1].command](document)
        found.append(
            Candidate(
                settings=settings, folder=folder, ran=ran, **{key: score[key] for key in ("value", "low", "high")}
            )
        )
    result = Tuning(candidates=found, best=max(found, key=lambda candidate: candidate.value), out=out)
    write_whole(out / "results.json", (json.dumps(result.document(), indent=2) + "\n").encode())
    return result
