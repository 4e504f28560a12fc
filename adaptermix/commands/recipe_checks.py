"""Checks of a recipe before its first step: outputs, inputs, the use of test data, and the rows of data files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, OutputError, codes_of, did_you_mean
from ..io.files import real_path
from ..options.paths import written_paths
from ..options.roles import ADAPTER, SCORED, TEST, Reads, main_output, marks_of, used_for, values_of
from ..tasks.data import DataFile
from ..tasks.splits import fault_of_tested, overlaps_of, read_record
from .recipe_file import Step
from .step_data import TestFile, data_files, faults_of_data


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
            f"{path}: step {number} ({step.title}): {fault}. Give other data or other rows{way_out}.",
            code="recipe.split",
        )


def check_data(path: Path, steps: Sequence[Step]) -> None:
    """Read the data files of all steps, except those that an earlier step makes and those of the Hub.

    Args:
        path: The recipe.
        steps: Its steps.

    Raises:
        ConfigError: files have faults; all of them are listed at once.
    """
    made: set[Path] = set()
    faults: dict[tuple[str, str], list[str]] = {}
    codes: list[str] = []
    for number, step in enumerate(steps, start=1):
        for option, error in faults_of_data(step.settings, made):
            faults.setdefault((option, str(error)), []).append(f"step {number} ({step.title})")
            codes += codes_of(error)
        made |= set(map(real_path, written_paths(step.settings)))
    if not faults:
        return
    texts = []
    for (option, text), of_steps in faults.items():
        more = f" and {len(of_steps) - 1} more step{'s' * (len(of_steps) > 2)}" if len(of_steps) > 1 else ""
        texts.append(f"{of_steps[0]}{more}, {option}: {text}")
    raise ConfigError(str(path), faults=texts, code="recipe.data", codes=dict.fromkeys(["recipe.data", *codes]))


def output_of(step: Step) -> Path | None:
    """Return the main output of a step, if it has one."""
    output = main_output(step.settings)
    return Path(output[0]) if output and output[0] and not _is_dry(step) else None


def _is_dry(step: Step) -> bool:
    return bool(getattr(step.settings, "dry_run", False))


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
    made: dict[Path, Path] = {}
    makers: dict[Path, Step] = {}
    folders = {out.parent for step in steps if (out := output_of(step))}
    for number, step in enumerate(steps, start=1):
        title = f"{path}: step {number} ({step.title})"
        for adapter in _read(step):
            if adapter.parent in folders and not adapter.exists() and real_path(adapter) not in made:
                near = did_you_mean(str(adapter), list(map(str, made.values())))
                raise ConfigError(
                    f"{title} reads {adapter}, which is not there, and no step before it makes it.{near}",
                    code="recipe.no-input",
                )
        written_here = [] if _is_dry(step) else written_paths(step.settings)
        for written in written_here:
            if earlier := makers.get(real_path(written)):
                names = " and ".join(f"${{{name}}}" for name in step.loop)
                fix = f" Put {names} into its path." if earlier.written == step.written and names else ""
                raise ConfigError(
                    f"{title} writes {written}, which an earlier step writes too.{fix}", code="recipe.output-twice"
                )
        makers |= {real_path(written): step for written in written_here}
        out = output_of(step)
        if out is None:
            continue
        made[real_path(out)] = out
        if out.exists() and not resume and not getattr(step.settings, "overwrite", False):
            raise OutputError(
                f"{title} writes {out}, which exists. Pass --resume to use it and continue, or give another folder.",
                code="recipe.output-exists",
            )
