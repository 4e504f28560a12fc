"""Recipes: a chain of commands from YAML, checked whole before the first step runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import Coded, ConfigError
from ..io.json_types import JsonObject
from ..io.launcher import is_main_process, process_count
from ..options.paths import written_paths
from ..options.roles import main_output
from ..progress import SILENT, Watcher
from .expected import Expected, check_files, write_tables
from .recipe_checks import check_places, check_splits, output_of
from .recipe_file import Recipe, Step, read_recipe
from .record import document_of
from .run_files import check_run_files, write_run
from .step_record import check_same, document_of_output, recorded
from .table import COMMANDS

Runner = Callable[[Step], JsonObject]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a recipe has done.

    Args:
        documents: The JSON document of each step.
        expected: The tables of expected figures, with ours.
    """

    documents: Sequence[JsonObject]
    expected: Sequence[Expected]


def checked_recipe(path: Path, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Read a recipe and check it, also for the use of test data; see `read_recipe` and `check_splits`.

    Raises:
        ConfigError: it has faults.
    """
    recipe = read_recipe(path, overrides)
    check_splits(path, recipe.steps)
    return recipe


def load_recipe(path: Path, overrides: Mapping[str, object] | None = None) -> list[Step]:
    """Return the steps of a recipe; see `checked_recipe`."""
    return list(checked_recipe(path, overrides).steps)


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
    recipe = checked_recipe(Path(path), overrides)
    return list(run_checked(recipe, resume=resume, run=run, watch=watch).documents)


def run_checked(recipe: Recipe, *, resume: bool = False, run: Runner | None = None, watch: Watcher = SILENT) -> Run:
    """Run a recipe that was read, and compare its expected figures with those of the run; see `run_recipe`.

    The tables of expected figures, the documents of the steps (`run.json`) and a page on the run (`run.html`) are also
    written into the folder that the recipe's variable `out` names.

    Raises:
        ConfigError: the outputs of steps collide; no step was run.
        OutputError: an output exists, and no step was run; or it was made with other settings or files.
        AdapterMixError: a step failed; those before it are done.
    """
    check_outputs(recipe, resume=resume)
    others = sorted({step.command for step in recipe.steps if not COMMANDS[step.command].in_processes})
    if process_count() > 1 and others:
        raise ConfigError(
            f"several processes can train, and {recipe.path} has {', '.join(others)}: run it without a launcher.",
            code="recipe.processes",
        )
    documents: list[JsonObject] = []
    figures: list[tuple[str, JsonObject | None]] = []
    for number, step in enumerate(recipe.steps, start=1):
        try:
            document, full = _run(step, run or run_step, resume=resume, watch=watch)
        except Coded as error:
            error.args = (f"step {number} ({step.title}): {error}", *error.args[1:])
            raise
        documents.append(document)
        figures.append((step.name or step.command, full))
    expected = [table.compare(figures) for table in recipe.tables]
    if (folder := _folder_of_run(recipe)) and is_main_process() and (expected or folder.is_dir()):
        folder.mkdir(parents=True, exist_ok=True)
        if expected:
            write_tables(expected, folder)
        write_run(recipe, [document for _, document in figures], folder)
    return Run(documents=documents, expected=expected)


def check_outputs(recipe: Recipe, *, resume: bool = False) -> None:
    """Check the outputs of a recipe; see `check_places` and `check_files`.

    Raises:
        ConfigError: the outputs of steps collide, or no step makes an adapter that a step reads.
        OutputError: an output exists.
    """
    check_places(recipe.path, recipe.steps, resume=resume)
    if folder := _folder_of_run(recipe):
        if recipe.tables:
            check_files(folder)
        check_run_files(folder)


def _folder_of_run(recipe: Recipe) -> Path | None:
    """Return the folder of a run for files on all steps; the output of a step stays as the step wrote it."""
    written = {path for step in recipe.steps for path in written_paths(step.settings)}
    return recipe.out if recipe.out not in written else None


def _run(step: Step, run: Runner, *, resume: bool, watch: Watcher) -> tuple[JsonObject, JsonObject | None]:
    """Run a step, or use its existing output.

    Returns:
        Its document, and the one with its figures: if the step is skipped, the document in its record, or None
        if an earlier version wrote that record.
    """
    out = output_of(step)
    if resume and out and out.exists() and check_same(step.command, step.settings, out):
        watch.note(f"{step.title}: {out} is there and is taken")
        return {"command": step.command, "out": str(out), "skipped": True}, document_of_output(out)
    with recorded(step.command, step.settings, out) if out else nullcontext() as record:
        document = {"command": step.command, **run(going_on(step) if resume else step)}
        if record:
            record.document = document
    return document, document


def going_on(step: Step) -> Step:
    """Let training resume, and an evaluation replace the answers of an interrupted one."""
    output = main_output(step.settings)
    more = {"overwrite": True} if output and output[1].form else {}
    if "resume" in type(step.settings).model_fields:
        more = {"resume": True}
    return replace(step, settings=step.settings.model_copy(update=more))


def run_step(step: Step, *, watch: Watcher = SILENT) -> JsonObject:
    """Run one step and return its JSON document."""
    return document_of(COMMANDS[step.command].call(step.settings, watch=watch))
