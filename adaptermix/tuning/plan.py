"""The candidates of a search over a recipe, and the checks of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..commands.recipe_checks import check_splits
from ..commands.recipe_file import Step, variables_of
from ..commands.recipes import load_recipe
from ..errors import ConfigError, UsageError
from ..io.files import real_path
from ..io.json_types import JsonObject
from ..options.paths import written_paths
from ..weight_search.parameters import Choice, Interval, Parameter, combinations, read_parameter

SCORES = {"search": "best", "evaluate": "overall", "retrieve": "score"}
"""By the command of the last step: the key of the score in its document."""
Vary = Mapping[str, str | Sequence[object] | Parameter]
"""Searched values by setting: `LOW:HIGH` and other texts of `--vary`, sequences of values, or parameters."""


class RecipeCandidate(NamedTuple):
    """Settings that a trial runs the recipe with, the folder of the trial, and the steps."""

    settings: JsonObject
    folder: Path
    steps: list[Step]


def parameters_of(vary: Vary) -> dict[str, Parameter]:
    """Return the searched parameters: texts are read as those of `--vary`, other sequences are values to try.

    Raises:
        UsageError: a text cannot be read, or there are no values.

    Example:
        >>> parameters_of({"layer": "6:12", "rank": [8, 16]})
        {'layer': Interval(low=6, high=12, log=False, whole=True), 'rank': Choice(values=(8, 16))}
    """
    parameters: dict[str, Parameter] = {}
    for key, values in vary.items():
        if isinstance(values, Interval | Choice):
            parameters[key] = values
        else:
            parameters[key] = read_parameter(key, values) if isinstance(values, str) else Choice(tuple(values))
        if parameters[key] == Choice(()):
            raise UsageError(f"--vary {key} must have at least one value to try.", code="vary.empty")
    return parameters


def candidates(vary: Vary) -> list[JsonObject]:
    """Return all combinations of the values of each setting; the last setting changes fastest.

    Raises:
        UsageError: a parameter is a range, so its values cannot be listed.

    Example:
        >>> candidates({"a": [1, 2], "b": [3]})
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return combinations(parameters_of(vary))


def candidate_of(
    recipe: Path, overrides: Mapping[str, object], settings: Mapping[str, object], out: Path, number: int
) -> RecipeCandidate:
    """Check the recipe with a candidate's settings, and return the candidate; `number` counts from 1.

    Raises:
        ConfigError: the recipe is invalid with these settings, has no variable `out`, or does not end in a step that
            scores on dev data.
    """
    if "out" in overrides:
        raise ConfigError(
            "the variable 'out' must not be set, since each candidate has its own. Give --out instead.",
            code="tune.out-variable",
        )
    if "out" not in variables_of(recipe):
        raise ConfigError(
            f"{recipe}: a searched recipe needs a variable 'out', the folder of its outputs (such as ${{out}}/task).",
            code="tune.no-out-variable",
        )
    folder = out / "trials" / str(number)
    steps = load_recipe(recipe, {**overrides, **settings, "out": str(folder)})
    last = steps[-1]
    if last.command not in SCORES:
        *commands, final = SCORES
        raise ConfigError(
            f"{recipe}: the last step must be {', '.join(commands)} or {final} on dev data, since its score "
            f"decides; found {last.command!r}.",
            code="tune.last-step",
        )
    _check_no_test(recipe, steps)
    if "split" in type(last.settings).model_fields:
        deciding = deciding_steps(steps)
        steps = [
            replace(step, settings=step.settings.model_copy(update={"split": "dev"})) if step in deciding else step
            for step in steps
        ]
    check_splits(recipe, steps)
    elsewhere = [step for step in steps if not _writes_within(step, folder)]
    if elsewhere:
        raise ConfigError(
            f"{recipe}: every output must lie in ${{out}}, and that of {elsewhere[0].command} does not, so that "
            "candidates would overwrite each other.",
            code="tune.output-outside",
        )
    return RecipeCandidate(dict(settings), folder, steps)


def deciding_steps(steps: Sequence[Step]) -> list[Step]:
    """Return the steps whose score decides: the last step, in all passes of the loops around it."""
    last = steps[-1]
    return [step for step in steps if step.written == last.written] if last.loop else [last]


def _check_no_test(recipe: Path, steps: Sequence[Step]) -> None:
    """Refuse to use test data once per candidate."""
    for number, step in enumerate(steps, start=1):
        if getattr(step.settings, "split", None) == "test":
            last = (
                "the last step must be on dev data, since its score decides"
                if step in deciding_steps(steps)
                else "a search must not look at test data once per candidate"
            )
            raise ConfigError(
                f"{recipe}: {last}; found split: test in step {number} ({step.command}). Evaluate the best candidate "
                "on test data when the search is done.",
                code="tune.test-split",
            )


def _writes_within(step: Step, folder: Path) -> bool:
    """Return whether all outputs of a step are in a folder, with links and `..` resolved."""
    return all(real_path(path).is_relative_to(real_path(folder)) for path in written_paths(step.settings))


def plan(recipe: Path, vary: Vary, out: Path, overrides: Mapping[str, object] | None = None) -> list[RecipeCandidate]:
    """Check the recipe with every combination of values, and return the candidates.

    Raises:
        ConfigError: the recipe is invalid for a candidate; see `candidate_of`.
        UsageError: a parameter is a range, so its values cannot be listed.
    """
    return [
        candidate_of(recipe, overrides or {}, settings, out, number)
        for number, settings in enumerate(candidates(vary), start=1)
    ]
