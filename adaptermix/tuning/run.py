"""`search RECIPE`: candidates from a grid or a sampler, one after another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..commands.recipes import Runner, Step
from ..errors import ConfigError, OutputError, UsageError
from ..io.files import held, write_whole
from ..io.launcher import process_count
from ..io.limited_yaml import read_yaml
from ..options import EvaluateSettings, SearchSettings
from ..progress import SILENT, Watcher
from ..weight_search.ask_tell import Proposals
from ..weight_search.space import Choice, Parameter
from ..weight_search.storage import fitting_sampler
from .plan import JUDGES, Planned, Vary, check_ends, folder_of, parameters_of, plan, steps_of
from .pruning import Report, check_looks, unheard
from .report import Candidate, Tuning, shown
from .step_cache import Outcome, StepRunner, Steps, check_place, identities

_TRIALS = "trials.log"
_LEARNING = ("tpe", "random")
"""Samplers to which stopped candidates do no harm."""


def chosen_sampler(sampler: str, parameters: Mapping[str, Parameter], *, prune: bool) -> str:
    """Return the sampler that is meant.

    Raises:
        UsageError: one that does not go with `prune`.
    """
    if sampler == "auto":
        return "tpe" if prune else fitting_sampler(parameters.values())
    if prune and sampler not in _LEARNING:
        raise UsageError(
            f"--prune needs a sampler that learns from candidates that were stopped, and {sampler} does not: take "
            f"{' or '.join(_LEARNING)}, or drop --prune."
        )
    return sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A search over a recipe, checked.

    Args:
        recipe: The YAML file.
        overrides: Values that all candidates share.
        out: Folder of all candidates.
        parameters: What is varied.
        planned: All candidates of a grid; those at the ends of ranges where a sampler proposes.
        trials: Candidates that a sampler proposes; None for a grid.
        sampler: The sampler.
        seed: Its seed.
        prune: Whether training that is behind is stopped.
        notes: What a person should know.
    """

    recipe: Path
    overrides: Mapping[str, Any]
    out: Path
    parameters: Mapping[str, Parameter]
    planned: Sequence[Planned]
    trials: int | None
    sampler: str
    seed: int
    prune: bool
    notes: tuple[str, ...]

    @property
    def asked(self) -> dict[str, Any]:
        """Return what a folder is of."""
        vary = {key: list(p.values) if isinstance(p, Choice) else str(p) for key, p in self.parameters.items()}
        proposed: dict[str, Any] = (
            {} if self.trials is None else {"sampler": self.sampler, "seed": self.seed, "prune": self.prune}
        )
        return {"vary": vary, "recipe": self._digest()} | proposed

    def _digest(self) -> str:
        """Return a hash of what the recipe says, whatever its comments."""
        document = read_yaml(self.recipe)
        text = json.dumps([document, dict(self.overrides)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def candidate(self, number: int, settings: Mapping[str, Any]) -> Planned:
        """Return a candidate of these settings.

        Raises:
            ConfigError: the recipe does not take them.
        """
        folder = folder_of(self.out, number)
        return dict(settings), folder, steps_of(self.recipe, self.overrides, settings, folder)


def check(
    recipe: str | Path,
    vary: Vary,
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    trials: int | None = None,
    sampler: str = "auto",
    seed: int = 0,
    prune: bool = False,
) -> Checked:
    """Check a search over a recipe; see `tune`.

    Raises:
        AdapterMixError: the recipe has faults, or options contradict each other.
    """
    if trials is None and sampler != "auto":
        raise UsageError(
            "--sampler is what proposes candidates, and without --trials all values are tried: add --trials N, or drop "
            "it."
        )
    if process_count() > 1:
        raise ConfigError(
            f"a search over a recipe is one process, and {process_count()} are started: drop the launcher."
        )
    recipe, out, parameters = Path(recipe), Path(out), parameters_of(vary)
    check_place(out)
    planned = (plan if trials is None else check_ends)(recipe, parameters, out, overrides)
    note = check_looks(recipe, planned) if prune else None
    return Checked(
        recipe=recipe,
        overrides=overrides or {},
        out=out,
        parameters=parameters,
        planned=planned,
        trials=trials,
        sampler=chosen_sampler(sampler, parameters, prune=prune),
        seed=seed,
        prune=prune,
        notes=(note,) if note else (),
    )


def tune(
    recipe: str | Path,
    vary: Vary,
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    trials: int | None = None,
    sampler: str = "auto",
    seed: int = 0,
    prune: bool = False,
    run: Runner | None = None,
    watch: Watcher = SILENT,
) -> Tuning:
    """Run a recipe with many settings and find the best by its last step, on dev data.

    Without `trials` every combination of values is run. What was done stays in `out`, so the same call goes on after
    an interruption.

    Args:
        recipe: The YAML file; its outputs lie in `${out}`, and its last step is `search` or `evaluate` on dev data.
        vary: Values to try, or a text such as "6:12" or "0.02:2:log", of variables, or of settings as
            `command.setting`.
        out: Folder of all candidates and of `results.json`.
        overrides: Values that all candidates share.
        trials: Candidates that a sampler proposes, each once, instead of all combinations; may be raised to go on.
        sampler: `random`, `tpe`, `cmaes` or `gp`; `auto` is gp for up to 8 ranges, else tpe, also where stopped
            candidates are to be learnt from.
        seed: Seed of the sampler.
        prune: Stop candidates whose training is behind that of earlier ones, see `tuning.pruning`.
        run: What runs a step; default the library's own calls. One of one's own tells of no looks at dev data, so that
            nothing is stopped.
        watch: Receives progress.

    Raises:
        AdapterMixError: the recipe has faults, or a step failed; what was done before it stays.
    """
    checked = check(recipe, vary, out=out, overrides=overrides, trials=trials, sampler=sampler, seed=seed, prune=prune)
    for note in checked.notes:
        watch.note(note)

    def run_one(step: Step, listener: Watcher) -> dict[str, Any]:
        return run(step) if run else run_step(step, watch=listener)

    with held(checked.out, checked.out):
        return _tuned(checked, run_one, watch)


def run_step(step: Step, *, watch: Watcher = SILENT) -> dict[str, Any]:
    """Run one step and return its JSON document; that of a score has its resamples, see `run_judge`."""
    from ..commands import recipes
    from ..commands.judge import run_judge

    if isinstance(step.settings, EvaluateSettings | SearchSettings):
        return run_judge(step.settings, watch=watch)
    return recipes.run_step(step, watch=watch)


def _tuned(checked: Checked, run_one: StepRunner, watch: Watcher) -> Tuning:
    steps = Steps(checked.out, checked.asked, run_one, prune=checked.prune, watch=watch)
    found = [_candidate(*trial) for trial in _trials(checked, steps, watch)]
    result = Tuning.of(found, checked.out)
    write_whole(checked.out / "results.json", (json.dumps(result.document(), indent=2) + "\n").encode())
    return result


Trial = tuple[Planned, Outcome]


def _trials(checked: Checked, steps: Steps, watch: Watcher) -> Iterator[Trial]:
    return _all(checked, steps, watch) if checked.trials is None else _proposed(checked, steps, watch)


def _all(checked: Checked, steps: Steps, watch: Watcher) -> Iterator[Trial]:
    for number, planned in enumerate(checked.planned, start=1):
        watch.note(f"candidate {number} of {len(checked.planned)}: {shown(planned[0])}")
        yield planned, _run(steps, planned, watch)


def _proposed(checked: Checked, steps: Steps, watch: Watcher) -> Iterator[Trial]:
    """Run what a sampler proposes; what was told of before is only looked up.

    Raises:
        OutputError: what was told of was run with other settings or files.
    """
    proposals = Proposals(checked.out / _TRIALS, checked.parameters, sampler=checked.sampler, seed=checked.seed)
    count = max(checked.trials or 0, len(proposals))
    for number in range(count):
        settings = proposals.point(number)
        if settings is None:
            watch.note(f"all {number} candidates were tried.")
            return
        planned = checked.candidate(number + 1, settings)
        key = identities(planned[2], planned[1])[-1][0]
        if proposals.note(number) not in (None, key):
            raise OutputError(
                f"{checked.out} must hold candidates of one recipe and the same files, and that of {shown(settings)} "
                "was run with others. Give another --out."
            )
        watch.note(f"candidate {number + 1} of {count}: {shown(settings)}")
        outcome = _run(steps, planned, watch, proposals.report)
        proposals.tell(None if outcome.pruned else _score(planned, outcome)["value"], key)
        yield planned, outcome


def _run(steps: Steps, planned: Planned, watch: Watcher, report: Report = unheard) -> Outcome:
    outcome = steps.run(planned[2], planned[1], report)
    if outcome.pruned:
        watch.note(outcome.pruned.sentence())
    return outcome


def _score(planned: Planned, outcome: Outcome) -> Mapping[str, Any]:
    judge: Callable[[Mapping[str, Any]], Mapping[str, Any]] = JUDGES[planned[2][-1].command]
    return judge(outcome.document)


def _candidate(planned: Planned, outcome: Outcome) -> Candidate:
    score = {} if outcome.pruned else _score(planned, outcome)
    return Candidate(
        settings=planned[0],
        folder=planned[1],
        ran=outcome.ran,
        pruned=outcome.pruned,
        resamples=() if outcome.pruned else outcome.document.get("resamples", ()),
        rows=outcome.document.get("units", 0),
        **{name: score.get(name) for name in ("value", "low", "high")},
    )
