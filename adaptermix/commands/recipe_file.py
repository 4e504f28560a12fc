"""A recipe read from its file: the steps with their settings, and the tables of expected figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from ..errors import ConfigError, UsageError, near_or_known
from ..io.limited_yaml import Filling, names_in, read_yaml, shortened
from ..io.yaml_lines import Faults, KeyPath
from ..options import Settings
from ..options.base import described
from ..tasks import get_task
from ..tasks.base import require_comparable
from .expected import Table, read_tables
from .loops import Entry, expand, key_path_of
from .table import COMMANDS

STEPS = {command.name: command.schema() for command in COMMANDS.values() if command.in_recipes}
"""Options of the commands that can be steps of a recipe."""
_TOP = ("version", "variables", "steps", "expect")
_NAME = "name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One checked step.

    Args:
        command: Name of the command.
        settings: Its settings.
        name: The name by which tables of expected figures refer to it; empty without a name.
        loop: The values of the loops around it, by variable.
        written: Where it is in the file, see `Entry`.
    """

    command: str
    settings: Settings
    name: str = ""
    loop: Mapping[str, object] = field(default_factory=dict)
    written: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """The command, with the values of the loops, such as `train-joint, layer 8`."""
        return _title(self.command, self.loop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A checked recipe.

    Args:
        path: The file.
        steps: The steps of all passes of its loops, in the order in which they run.
        tables: The tables of expected figures.
        out: The folder that the variable `out` names, if there is such a variable.
    """

    path: Path
    steps: Sequence[Step]
    tables: Sequence[Table] = ()
    out: Path | None = None


def _title(command: str, loop: Mapping[str, object]) -> str:
    values = [f"{name} {text if len(text := str(value)) <= 40 else text[:40] + '...'}" for name, value in loop.items()]
    return ", ".join([command, *values])


class _Faults:
    """Faults of steps; a fault that the passes of a loop share is listed once."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._seen: set[tuple[tuple[int, ...], str]] = set()

    def add(self, entry: Entry, step: str, fault: str, *, at: KeyPath = ()) -> None:
        """Add the fault of an entry.

        Args:
            entry: The entry.
            step: Its number and command.
            fault: The message.
            at: Its place in the entry.
        """
        if (entry.written, fault) not in self._seen:
            self._seen.add((entry.written, fault))
            self._faults.at((*key_path_of(entry.written), *at), f"{step}{fault}")


def _step(number: int, entry: Entry, overrides: Mapping[str, object], faults: _Faults) -> Step | None:
    """Check one step; faults are collected, not raised."""
    content, step = entry.content, f"step {number}"
    commands = [key for key in content if key != _NAME] if isinstance(content, dict) else []
    if not isinstance(content, dict) or len(commands) != 1:
        faults.add(
            entry,
            step,
            f" must be one command with its settings, such as 'merge: {{...}}', found {shortened(content)}.",
        )
        return None
    command, name = commands[0], content.get(_NAME, "")
    values = content[command]
    if command not in STEPS:
        faults.add(entry, step, f": unknown command {shortened(command)}.{near_or_known(str(command), list(STEPS))}")
        return None
    step = f"step {number} ({_title(command, entry.loop)})"
    if not isinstance(values, dict):
        faults.add(entry, step, f": settings must be a mapping, found {shortened(values)}.")
        return None
    if not isinstance(name, str):
        faults.add(entry, step, f": name must be text, found {shortened(name)}.")
        return None
    settings = _settings_of(command, values, overrides, partial(faults.add, entry, step))
    if settings is None:
        return None
    return Step(command=command, settings=settings, name=name, loop=entry.loop, written=entry.written)


def _settings_of(
    command: str, values: Mapping[object, object], overrides: Mapping[str, object], add: Callable[..., None]
) -> Settings | None:
    """Return the settings of a step whose command is known; None with faults, which `add` receives."""
    schema = STEPS[command]
    written = {str(key).replace("-", "_"): str(key) for key in values}
    if len(written) < len(values):
        add(": an option must be set once, and one is there with - and with _.", at=(command,))
        return None
    options = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key, value in overrides.items():
        if key.startswith(f"{command}."):
            options[key.partition(".")[2].replace("-", "_")] = value
    try:
        settings = schema(**options)
        _check_task(settings)
        return settings
    except UsageError as error:
        add(f": {error}")
    except ValidationError as error:
        for key, message in described(error, schema):
            add(f": {message}", at=(command, written.get(key, key)))
    return None


def _check_task(settings: Settings) -> None:
    """Refuse a task whose answers the objective of the step cannot compare: the steps before it may take hours.

    Raises:
        UsageError: it is one.
    """
    if getattr(settings, "objective", None) == "agreement":
        require_comparable(get_task(str(getattr(settings, "task", None))))


def variables_of(path: Path) -> Mapping[str, object]:
    """Return the variables of a recipe as they are written; none if `read_recipe` will refuse it."""
    try:
        document = read_yaml(path)
    except ConfigError:
        return {"out": None}
    variables = document.get("variables") if isinstance(document, dict) else None
    return variables if isinstance(variables, dict) else {}


def read_recipe(path: Path, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Read and check a recipe; the use of test data is not checked here.

    Args:
        path: The YAML file: `version: 1`, optional `variables` and `expect`, and `steps`, each one command with its
            settings, or a loop.
        overrides: Values of variables by name, or of settings as `command.setting`.

    Raises:
        ConfigError: the file is missing or malformed; all faults are listed at once.
    """
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} must be a mapping with {', '.join(_TOP)}, found {type(document).__name__}.",
            code="recipe.not-mapping",
        )
    faults = Faults()
    for key in document:
        if key not in _TOP:
            faults.at((key,), f"unknown key {shortened(key)}.{near_or_known(str(key), _TOP)}")
    if document.get("version") != 1:
        faults.at(("version",), f"version must be 1, found {shortened(document.get('version'))}.")
    written = document.get("steps")
    if not isinstance(written, list) or not written:
        faults.at(("steps",), "steps must be a list of at least one command.")
        written = []
    variables = document.get("variables") or {}
    if not isinstance(variables, dict):
        faults.at(("variables",), f"variables must be a mapping, found {shortened(variables)}.")
        variables = {}
    overrides = dict(overrides or {})
    named = {str(name): value for name, value in variables.items()}
    variables = named | {key: value for key, value in overrides.items() if "." not in key}
    entries = expand(written, variables, faults)
    faults += _check_overrides(overrides, named, entries)
    of_steps = _Faults(faults)
    checked = [_step(number, entry, overrides, of_steps) for number, entry in enumerate(entries, start=1)]
    steps = [step for step in checked if step is not None]
    plain = _plain(variables)
    tables: Sequence[Table] = ()
    if "expect" in document:
        # another list of models or seeds may leave out steps, and their figures are then "not run"
        is_complete = len(steps) == len(entries) and not any(name in named for name in overrides)
        names = [step.name or step.command for step in steps] if is_complete else None
        tables = read_tables(document["expect"], plain, names, faults)
    if faults:
        raise ConfigError(str(path), faults=faults.with_lines(path), code="recipe.invalid")
    out = plain.get("out")
    return Recipe(path=path, steps=steps, tables=tables, out=Path(out) if isinstance(out, str) and out else None)


def _plain(variables: Mapping[str, object]) -> dict[str, object]:
    """Return the variables that need no loop, with the variables in them replaced."""
    plain = {name: value for name, value in variables.items() if names_in(value) <= set(variables)}
    fill = Filling(plain, Faults())
    return {name: fill(value) for name, value in plain.items()}


def _check_overrides(
    overrides: Mapping[str, object], variables: Mapping[str, object], entries: Sequence[Entry]
) -> list[str]:
    """Return a fault for each override that names no variable and no step."""
    commands = {str(key) for entry in entries if isinstance(entry.content, dict) for key in entry.content}
    faults = []
    for key in overrides:
        command, dot, _ = key.partition(".")
        known = sorted(commands - {_NAME}) if dot else sorted(variables)
        if command not in known:
            faults.append(f"override {key!r} meets no {'step' if dot else 'variable'}.{near_or_known(command, known)}")
    return faults
