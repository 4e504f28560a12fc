"""Which candidates there are, and that the recipe takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..commands.recipes import Step, check_splits, load_recipe, variables_of
from ..errors import ConfigError, UsageError
from ..io.files import real_path
from ..options import EvaluateSettings
from ..options.paths import written_paths
from ..weight_search.parameters import combinations, ends, read_parameter
from ..weight_search.space import Choice, Interval, Parameter

JUDGES = {"search": lambda document: document["best"], "evaluate": lambda document: document["overall"]}
Vary = Mapping[str, str | Sequence[Any] | Parameter]
"""What is varied: `LOW:HIGH` and other texts of `--vary`, values to try, or parameters, by setting."""
Planned = tuple[dict[str, Any], Path, list[Step]]
"""A candidate's settings, folder and steps."""


def parameters_of(vary: Vary) -> dict[str, Parameter]:
    """Return what is varied as parameters: a text is read as that of `--vary`, other sequences are values to try.

    Raises:
        UsageError: a text that cannot be read, or no values.

    Example:
        >>> parameters_of({"layer": "6:12", "rank": [8, 16]})
        {'layer': Interval(low=6, high=12, log=False, whole=True), 'rank': Choice(values=(8, 16))}
    """
    found: dict[str, Parameter] = {}
    for key, given in vary.items():
        if not isinstance(given, str | Interval | Choice):
            found[key] = Choice(tuple(given))
        else:
            found[key] = read_parameter(key, given) if isinstance(given, str) else given
        if found[key] == Choice(()):
            raise UsageError(f"--vary {key} must have values to try, and has none: give one or more.")
    return found


def candidates(vary: Vary) -> list[dict[str, Any]]:
    """Return all combinations of the values of each setting, the last setting changing fastest.

    Raises:
        UsageError: a range, which has no end of values.

    Example:
        >>> candidates({"a": [1, 2], "b": [3]})
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return combinations(parameters_of(vary))


def steps_of(recipe: Path, overrides: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> list[Step]:
    """Check a candidate's recipe and return its steps.

    Raises:
        ConfigError: the recipe has faults with it, has no variable `out`, or ends in no step that judges on dev data.
    """
    if "out" in overrides:
        raise ConfigError("the variable out is the candidates' own here. Give --out instead.")
    if "out" not in variables_of(recipe):
        raise ConfigError(
            f"{recipe}: a recipe that is searched needs a variable 'out', in which its steps write (as ${{out}}/task), "
            "and has none."
        )
    steps = load_recipe(recipe, {**overrides, **settings, "out": str(folder)})
    if steps[-1].command not in JUDGES:
        raise ConfigError(
            f"{recipe}: the last step must be {' or '.join(JUDGES)}, on dev data: its score decides; found "
            f"{steps[-1].command!r}."
        )
    _check_no_test(recipe, steps)
    steps[-1] = _judge(steps[-1])
    check_splits(recipe, steps)
    elsewhere = [step for step in steps if not _within(step, folder)]
    if elsewhere:
        raise ConfigError(
            f"{recipe}: every output must lie in ${{out}}, and that of {elsewhere[0].command} does not, so that "
            "candidates would overwrite each other."
        )
    return steps


def _check_no_test(recipe: Path, steps: Sequence[Step]) -> None:
    """Refuse to look at test data once per candidate."""
    for number, step in enumerate(steps, start=1):
        if getattr(step.settings, "split", None) == "test":
            last = (
                "the last step must be on dev data: its score decides"
                if number == len(steps)
                else "a search must not look at test data once per candidate"
            )
            raise ConfigError(
                f"{recipe}: {last}; found split: test in step {number} ({step.command}). Evaluate the best candidate "
                "on test data when the search is done."
            )


def _judge(step: Step) -> Step:
    """Return the last step, whose data are dev data."""
    if not isinstance(step.settings, EvaluateSettings):
        return step
    return Step(command=step.command, settings=step.settings.model_copy(update={"split": "dev"}))


def _within(step: Step, folder: Path) -> bool:
    """Return whether all that a step writes lies in a folder, links and `..` resolved."""
    return all(real_path(path).is_relative_to(real_path(folder)) for path in written_paths(step.settings))


def folder_of(out: Path, number: int) -> Path:
    """Return the folder of a candidate, which are counted from 1."""
    return out / "trials" / str(number)


def plan(
    recipe: Path,
    vary: Vary,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
) -> list[Planned]:
    """Check every candidate's recipe and return its settings, its folder and its steps.

    Raises:
        ConfigError: the recipe has faults with some candidate, has no variable `out`, or ends in no step that judges.
        UsageError: a range, which has no end of values.
    """
    found = []
    for number, settings in enumerate(candidates(vary), start=1):
        folder = folder_of(out, number)
        found.append((settings, folder, steps_of(recipe, overrides or {}, settings, folder)))
    return found


def check_ends(
    recipe: Path,
    vary: Vary,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
) -> list[Planned]:
    """Check the recipe with the ends of every range and each value, and return these candidates.

    Raises:
        ConfigError: see `plan`.
    """
    return plan(recipe, ends(parameters_of(vary)), out, overrides)
