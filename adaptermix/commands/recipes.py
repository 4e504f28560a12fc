"""Recipes: a chain of commands from YAML, checked whole before the first step runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ..errors import ConfigError, OutputError, UsageError, did_you_mean, near_or_known
from ..io.files import real_path
from ..io.json_types import JsonObject
from ..io.launcher import process_count
from ..io.limited_yaml import Filling, read_yaml, shortened
from ..options import Settings
from ..options.base import described
from ..options.roles import ADAPTER, SCORED, TEST, Reads, main_output, marks_of, used_for, values_of
from ..progress import SILENT, Watcher
from ..tasks import get_task
from ..tasks.base import require_comparable
from ..tasks.data import DataFile
from ..tasks.splits import fault_of_tested, overlaps_of, read_record
from .record import document_of
from .step_data import TestFile, data_files
from .step_record import check_same, recorded
from .table import COMMANDS

STEPS = {command.name: command.schema() for command in COMMANDS.values() if command.in_recipes}
"""Options of the commands that can be steps of a recipe."""
_TOP = ("version", "variables", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One checked step.

    Args:
        command: Name of the command.
        settings: Its settings.
    """

    command: str
    settings: Settings


def _step(number: int, entry: object, overrides: Mapping[str, object], faults: list[str]) -> Step | None:
    """Check one entry of `steps`; faults are collected, not raised."""
    step = f"step {number}"
    if not isinstance(entry, dict) or len(entry) != 1:
        faults.append(
            f"{step} must be one command with its settings, such as 'merge: {{...}}', found {shortened(entry)}."
        )
        return None
    command, values = next(iter(entry.items()))
    if command not in STEPS:
        faults.append(f"{step}: unknown command {shortened(command)}.{near_or_known(str(command), list(STEPS))}")
        return None
    if not isinstance(values, dict):
        faults.append(f"{step} ({command}): settings must be a mapping, found {shortened(values)}.")
        return None
    schema = STEPS[command]
    values = {str(key): value for key, value in values.items()}
    overridden = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(f"{command}.")}
    try:
        settings = schema(**(values | overridden))
        _check_task(settings)
        return Step(command=command, settings=settings)
    except UsageError as error:
        faults.append(f"{step} ({command}): {error}")
        return None
    except ValidationError as error:
        faults += [f"{step} ({command}): {message}" for message in described(error, schema)]
        return None


def _check_task(settings: Settings) -> None:
    """Refuse a task whose answers the objective of the step cannot compare: the steps before it may take hours.

    Raises:
        UsageError: it is one.
    """
    if getattr(settings, "objective", None) == "agreement":
        require_comparable(get_task(str(getattr(settings, "task", None))))


def variables_of(path: Path) -> Mapping[str, object]:
    """Return the variables of a recipe as they are written; none if `load_recipe` will refuse it."""
    try:
        document = read_yaml(path)
    except ConfigError:
        return {"out": None}
    variables = document.get("variables") if isinstance(document, dict) else None
    return variables if isinstance(variables, dict) else {}


def load_recipe(path: Path, overrides: Mapping[str, object] | None = None) -> list[Step]:
    """Read and check a recipe.

    Args:
        path: The YAML file: `version: 1`, optional `variables`, and `steps`, each one command with its settings.
        overrides: Values of variables by name, or of settings as `command.setting`.

    Raises:
        ConfigError: the file is missing or malformed; all faults are listed at once. Or it uses test data for
            something else, see `check_splits`.
    """
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} must be a mapping with {', '.join(_TOP)}, found {type(document).__name__}.",
            code="recipe.not-mapping",
        )
    faults = [f"unknown key {shortened(key)}.{near_or_known(str(key), _TOP)}" for key in document if key not in _TOP]
    if document.get("version") != 1:
        faults.append(f"version must be 1, found {shortened(document.get('version'))}.")
    steps = document.get("steps")
    if not isinstance(steps, list) or not steps:
        faults.append("steps must be a list of at least one command.")
        steps = []
    variables = document.get("variables") or {}
    if not isinstance(variables, dict):
        faults.append(f"variables must be a mapping, found {shortened(variables)}.")
        variables = {}
    variables = {str(name): value for name, value in variables.items()}
    overrides = dict(overrides or {})
    faults += _check_overrides(overrides, variables, steps)
    variables |= {key: value for key, value in overrides.items() if "." not in key}
    # a variable may contain other variables, but only one level deep
    fill = Filling(variables, faults)
    variables = {name: fill(value) for name, value in variables.items()}
    fill = Filling(variables, faults)
    checked = [_step(number, fill(entry), overrides, faults) for number, entry in enumerate(steps, start=1)]
    if faults:
        raise ConfigError(f"{path}: " + " | ".join(dict.fromkeys(faults)), code="recipe.invalid")
    complete = [step for step in checked if step is not None]
    check_splits(path, complete)
    return complete


def _check_overrides(
    overrides: Mapping[str, object], variables: Mapping[str, object], steps: Sequence[object]
) -> list[str]:
    """Return a fault for each override that names no variable and no step."""
    commands = {str(command) for entry in steps if isinstance(entry, dict) for command in entry}
    faults = []
    for key in overrides:
        command, dot, _ = key.partition(".")
        known = sorted(commands) if dot else sorted(variables)
        if command not in known:
            faults.append(f"override {key!r} meets no {'step' if dot else 'variable'}.{near_or_known(command, known)}")
    return faults


def check_splits(path: Path, steps: Sequence[Step]) -> None:
    """Refuse to choose or train on test data of another step, or on rows that were evaluated as test data before.

    Rows are recognised by their texts, see `adaptermix.tasks.splits`; in files that a step is yet to
    make, and in those of the Hub, by the file's name and their numbers.

    Args:
        path: The recipe.
        steps: Its steps.

    Raises:
        ConfigError: a step uses rows so; those that were evaluated before are allowed where `allow_tested` is set.
    """
    known = read_record().entries
    if not known and all(use != TEST for step in steps for use in used_for(step.settings)):
        return
    used: dict[tuple[int, str], list[DataFile]] = {}
    for number, step in enumerate(steps, start=1):
        for use, file in data_files(step.settings):
            used.setdefault((number, use), []).append(file)
    tests = [TestFile(step=number, file=file) for (number, use), files in used.items() for file in files if use == TEST]
    for (number, use), files in used.items():
        if use in (TEST, SCORED):
            continue
        step = steps[number - 1]
        allowed = getattr(step.settings, "allow_tested", None)
        if overlap := next((each for each in overlaps_of(files, tests) if each.rows.matters), None):
            fault = (
                f"{use} must not be test data, and {overlap} {overlap.verb_now} test data of step {overlap.first.step}"
            )
            way_out = f", or drop split: test in step {overlap.first.step}"
        elif not allowed and (before := next((each for each in overlaps_of(files, known) if each.rows.matters), None)):
            fault = fault_of_tested(use, before)
            way_out = "" if allowed is None else ", or set allow_tested: true there"
        else:
            continue
        raise ConfigError(
            f"{path}: step {number} ({step.command}): {fault}. Give other data or other rows{way_out}.",
            code="recipe.split",
        )


def _written(step: Step) -> Path | None:
    """Return the main output of a step, if it has one."""
    output = main_output(step.settings)
    is_dry = getattr(step.settings, "dry_run", False)
    return Path(output[0]) if output and output[0] and not is_dry else None


def _read(step: Step) -> list[Path]:
    """Return the adapters that a step reads."""
    names = [name for name, mark in marks_of(step.settings, Reads).items() if mark.use == ADAPTER]
    if getattr(step.settings, "against", None) == "base":  # the model without an adapter, and not a folder
        names.remove("against")
    return [Path(value) for value in values_of(step.settings, names)]


def check_places(path: Path, steps: Sequence[Step], *, resume: bool = False) -> None:
    """Refuse steps that would fail only after those before them.

    Args:
        path: The recipe.
        steps: Its steps.
        resume: Whether existing outputs are reused.

    Raises:
        ConfigError: two steps write the same output, or no step makes an adapter that a step reads next to the outputs.
        OutputError: an output exists.
    """
    made: list[Path] = []
    folders = {out.parent for step in steps if (out := _written(step))}
    for number, step in enumerate(steps, start=1):
        for adapter in _read(step):
            is_made = real_path(adapter) in map(real_path, made)
            if not is_made and adapter.parent in folders and not adapter.exists():
                near = did_you_mean(str(adapter), list(map(str, made)))
                raise ConfigError(
                    f"{path}: step {number} ({step.command}) reads {adapter}, which is not there, and no step before "
                    f"it makes it.{near}",
                    code="recipe.no-input",
                )
        out = _written(step)
        if out is None:
            continue
        if real_path(out) in map(real_path, made):
            raise ConfigError(
                f"{path}: step {number} ({step.command}) writes {out}, which an earlier step writes too.",
                code="recipe.output-twice",
            )
        made.append(out)
        if out.exists() and not resume and not getattr(step.settings, "overwrite", False):
            raise OutputError(
                f"{path}: step {number} ({step.command}) writes {out}, which exists. Pass --resume to use it "
                "and continue, or give another folder.",
                code="recipe.output-exists",
            )


Runner = Callable[[Step], JsonObject]


def run_recipe(
    path: str | Path,
    overrides: Mapping[str, object] | None = None,
    *,
    resume: bool = False,
    run: Runner | None = None,
    watch: Watcher = SILENT,
) -> list[JsonObject]:
    """Run a recipe and return the JSON document of each step.

    Args:
        path: The YAML file.
        overrides: Values of variables, or of settings as `command.setting`.
        resume: Reuse existing outputs if they were made with the same settings and from the same files, and continue
            interrupted training. The document of a step that is skipped has `skipped`.
        run: Runs a step; default `run_step`.
        watch: Receives a note for each step that is skipped.

    Raises:
        ConfigError: the recipe has faults; no step was run.
        OutputError: an output exists, and no step was run; or it was made with other settings or files.
        AdapterMixError: a step failed; those before it are done.
    """
    steps = load_recipe(Path(path), overrides)
    check_places(Path(path), steps, resume=resume)
    others = sorted({step.command for step in steps if not COMMANDS[step.command].in_processes})
    if process_count() > 1 and others:
        raise ConfigError(
            f"several processes can train, and {path} has {', '.join(others)}: run it without a launcher.",
            code="recipe.processes",
        )
    documents = []
    for step in steps:
        out = _written(step)
        if resume and out and out.exists() and check_same(step.command, step.settings, out):
            watch.note(f"{step.command}: {out} is there and is taken")
            documents.append({"command": step.command, "out": str(out), "skipped": True})
        else:
            with recorded(step.command, step.settings, out) if out else nullcontext():
                documents.append({"command": step.command, **(run or run_step)(going_on(step) if resume else step)})
    return documents


def going_on(step: Step) -> Step:
    """Let training resume, and an evaluation replace the answers of an interrupted one."""
    output = main_output(step.settings)
    more = {"overwrite": True} if output and output[1].form else {}
    if "resume" in type(step.settings).model_fields:
        more = {"resume": True}
    return Step(command=step.command, settings=step.settings.model_copy(update=more))


def run_step(step: Step, *, watch: Watcher = SILENT) -> JsonObject:
    """Run one step and return its JSON document."""
    return document_of(COMMANDS[step.command].call(step.settings, watch=watch))
