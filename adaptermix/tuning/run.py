"""`tune`: run a recipe with candidates from a grid or a sampler, one after another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypedDict, Unpack

from ..commands.recipe_file import Step
from ..commands.recipes import Runner
from ..errors import ConfigError, OutputError, UsageError
from ..io.files import locked_output, write_whole
from ..io.json_types import JsonObject
from ..io.launcher import process_count
from ..io.limited_yaml import read_yaml
from ..progress import SILENT, Watcher, runs_named
from ..weight_search.ask_tell import SequentialTrials
from ..weight_search.parameters import Choice, Parameter, ends
from ..weight_search.storage import fitting_sampler
from .plan import SCORES, RecipeCandidate, Vary, candidate_of, deciding_steps, parameters_of, plan
from .pruning import Report, check_looks, ignore
from .report import RecipeTrial, Tuning, label_of
from .step_cache import StepCache, check_folder, identities

_TRIALS = "trials.log"
_LEARNING = ("tpe", "random")
"""Samplers that can learn from stopped candidates."""


class TuneOptions(TypedDict, total=False):
    """Options of `check` and `tune`."""

    overrides: Mapping[str, object] | None
    trials: int | None
    sampler: str
    seed: int
    prune: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A search over a recipe, checked.

    Args:
        recipe: The YAML file.
        overrides: Values that all candidates share.
        out: Folder of all candidates.
        parameters: The searched parameters.
        planned: All candidates of a grid; for a sampler the candidates at the ends of the ranges.
        trials: Number of candidates from a sampler; None for a grid.
        sampler: The sampler.
        seed: Its seed.
        prune: Whether to stop training whose dev results are worse than those of earlier candidates.
        notes: Notes for the user.
    """

    recipe: Path
    overrides: Mapping[str, object]
    out: Path
    parameters: Mapping[str, Parameter]
    planned: Sequence[RecipeCandidate]
    trials: int | None
    sampler: str
    seed: int
    prune: bool
    notes: tuple[str, ...]

    @property
    def identity(self) -> JsonObject:
        """The recipe (without comments), the parameters and the sampler that a folder belongs to."""
        vary = {key: list(p.values) if isinstance(p, Choice) else str(p) for key, p in self.parameters.items()}
        text = json.dumps([read_yaml(self.recipe), dict(self.overrides)], sort_keys=True, default=str)
        identity = {"vary": vary, "recipe": hashlib.sha256(text.encode()).hexdigest()}
        sampling = {} if self.trials is None else {"sampler": self.sampler, "seed": self.seed, "prune": self.prune}
        return identity | sampling


def check(
    recipe: str | Path,
    vary: Vary,
    *,
    out: str | Path,
    overrides: Mapping[str, object] | None = None,
    trials: int | None = None,
    sampler: str = "auto",
    seed: int = 0,
    prune: bool = False,
) -> Checked:
    """Check a search over a recipe; see `tune`.

    Raises:
        AdapterMixError: the recipe is invalid, or options contradict each other.
    """
    if trials is None and sampler != "auto":
        raise UsageError(
            "--sampler needs --trials, since without --trials all values are tried: add --trials N, or drop --sampler.",
            code="tune.sampler",
        )
    if process_count() > 1:
        raise ConfigError(
            f"a search over a recipe must run in one process, and {process_count()} are started: drop the launcher.",
            code="tune.processes",
        )
    recipe, out, parameters = Path(recipe), Path(out), parameters_of(vary)
    check_folder(out)
    # A sampler may propose any value, so only candidates at the ends of the ranges are checked in advance.
    planned = plan(recipe, parameters if trials is None else ends(parameters), out, overrides)
    note = check_looks(recipe, planned) if prune else None
    if sampler == "auto":
        sampler = "tpe" if prune else fitting_sampler(parameters.values())
    elif prune and sampler not in _LEARNING:
        raise UsageError(
            f"--prune needs a sampler that learns from candidates that were stopped, and {sampler} does not: take "
            f"{' or '.join(_LEARNING)}, or drop --prune.",
            code="tune.prune-sampler",
        )
    return Checked(
        recipe=recipe,
        overrides=overrides or {},
        out=out,
        parameters=parameters,
        planned=planned,
        trials=trials,
        sampler=sampler,
        seed=seed,
        prune=prune,
        notes=(note,) if note else (),
    )


def tune(
    recipe: str | Path,
    vary: Vary,
    *,
    out: str | Path,
    run: Runner | None = None,
    watch: Watcher = SILENT,
    **options: Unpack[TuneOptions],
) -> Tuning:
    """Run a recipe with many settings and find the best by its last step, on dev data.

    Without `trials` every combination of values is run. Finished steps stay in `out`, so the same call continues after
    an interruption.

    Args:
        recipe: The YAML file; its outputs are in `${out}`, and its last step is `search`, `evaluate` or `retrieve`
            on dev data. If that step is in loops, the score is the mean over their passes.
        vary: Values to try, or a text such as "6:12" or "0.02:2:log", of variables, or of settings as
            `command.setting`.
        out: Folder of all candidates and of `results.json`.
        run: Runs a step; default the library's own calls. Another function does not report dev results, so
            `prune` has no effect with it.
        watch: Receives progress.
        options: `overrides`: values that all candidates share. `trials`: number of candidates that a sampler proposes,
            each once, instead of all combinations; may be raised to continue. `sampler`: `random`, `tpe`, `cmaes` or
            `gp`; `auto` is gp for up to 8 ranges, else tpe, also with `prune`. `seed`: seed of the sampler. `prune`:
            stop candidates whose training is worse on dev data than earlier training, see `tuning.pruning`.

    Raises:
        AdapterMixError: the recipe is invalid, or a step failed; outputs of earlier steps stay.
    """
    checked = check(recipe, vary, out=out, **options)
    for note in checked.notes:
        watch.note(note)

    def run_one(step: Step, pruning: Watcher) -> JsonObject:
        return run(step) if run else run_step(step, watch=pruning)

    with locked_output(checked.out, checked.out):
        steps = StepCache(checked.out, checked.identity, run_one, prune=checked.prune, watch=watch)
        trials = _grid(checked, steps, watch) if checked.trials is None else _sampled(checked, steps, watch)
        result = Tuning.of(list(trials), checked.out)
        write_whole(checked.out / "results.json", (json.dumps(result.document(), indent=2) + "\n").encode())
    return result


def run_step(step: Step, *, watch: Watcher = SILENT) -> JsonObject:
    """Run one step and return its JSON document; the document of a score includes its resamples, see `run_judge`."""
    from ..commands import recipes
    from ..commands.judge import Judge, run_judge

    if isinstance(step.settings, Judge):
        return run_judge(step.settings, watch=watch)
    return recipes.run_step(step, watch=watch)


def _grid(checked: Checked, steps: StepCache, watch: Watcher) -> Iterator[RecipeTrial]:
    for number, candidate in enumerate(checked.planned, start=1):
        watch.note(f"candidate {number} of {len(checked.planned)}: {label_of(candidate.settings)}")
        yield _run(steps, candidate, watch)


def _sampled(checked: Checked, steps: StepCache, watch: Watcher) -> Iterator[RecipeTrial]:
    """Run the sampler's proposals; finished ones are read from the store.

    Raises:
        OutputError: a finished proposal was run with other settings or files.
    """
    store = SequentialTrials(checked.out / _TRIALS, checked.parameters, sampler=checked.sampler, seed=checked.seed)
    count = max(checked.trials or 0, len(store))
    for number in range(count):
        settings = store.point(number)
        if settings is None:
            watch.note(f"all {number} candidates were tried.")
            return
        candidate = candidate_of(checked.recipe, checked.overrides, settings, checked.out, number + 1)
        key = identities(candidate.steps, candidate.folder)[-1][0]
        if store.note(number) not in (None, key):
            raise OutputError(
                f"{checked.out} must hold candidates of one recipe with the same files, and candidate "
                f"{label_of(settings)} was run with others. Give another --out.",
                code="tune.other-files",
            )
        watch.note(f"candidate {number + 1} of {count}: {label_of(settings)}")
        trial = _run(steps, candidate, watch, store.report)
        store.tell(trial.value, key)
        yield trial


def _run(steps: StepCache, candidate: RecipeCandidate, watch: Watcher, report: Report = ignore) -> RecipeTrial:
    # The outputs of all candidates have the same names, so a tracker needs the candidate's number.
    with runs_named(f"{candidate.folder.parents[1].name}-{candidate.folder.name}-"):
        outcome = steps.run(candidate.steps, candidate.folder, report)
    if outcome.pruned:
        watch.note(outcome.pruned.sentence())
    last = deciding_steps(candidate.steps)
    documents = [document for step, document in zip(candidate.steps, outcome.documents, strict=False) if step in last]
    scores = [] if outcome.pruned else [document[SCORES[last[0].command]] for document in documents]
    return RecipeTrial(
        settings=candidate.settings,
        folder=candidate.folder,
        ran=outcome.ran,
        pruned=outcome.pruned,
        resamples=_mean_resamples([document.get("resamples", ()) for document in documents]),
        rows=min((document.get("units", 0) for document in documents), default=0),
        **{name: _mean([score.get(name) for score in scores]) for name in ("value", "low", "high")},
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if there are no values, or one is unknown."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _mean_resamples(resamples: Sequence[Sequence[float]]) -> Sequence[float]:
    """Return the mean of the resamples of several passes; empty if those of one are not known.

    Shapes: takes [passes 1 + resamples].
    """
    if len({len(each) for each in resamples}) != 1:
        return ()
    return [fmean(values) for values in zip(*resamples, strict=True)]
