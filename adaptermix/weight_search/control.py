"""Random adapters in the place of the others: a gain that they have too is not a gain of the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters import AdapterSource, open_adapter, write_adapter
from ..algebra import LowRank, norm
from ..algebra.draws import uniform
from ..evaluation.score import Score
from .trials import Trial

if TYPE_CHECKING:
    from .candidate_model import Judge
    from .significance import Board
    from .space import Candidate
    from .trial_store import Ledger

CONTROL = -2
"""Number of the trial of random adapters."""
NAME = "random adapters in place of the others"


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """How random adapters score at the chosen weights, in the place of all adapters but the first.

    Args:
        tried: How many draws were tried; the one that scores best counts.
        score: What it is worth, with its interval.
        languages: Its score per language.
        gain: By how much it exceeds the first adapter alone, on the same rows.
        difference: By how much the chosen candidate exceeds it, on the same rows.
    """

    tried: int
    score: Score
    languages: dict[str, Score]
    gain: Score
    difference: Score

    @property
    def gains_too(self) -> bool:
        """Whether the chosen candidate is not better than the random adapters beyond chance."""
        return self.difference.low <= 0

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "tried": self.tried,
            "gains_too": self.gains_too,
            "score": self.score.document(),
            "scores": {name: score.document() for name, score in self.languages.items()},
            "gain": self.gain.document(),
            "difference": self.difference.document(),
        }


def control_of(
    chosen: Trial, baseline: Trial, *, judge: Judge, board: Board, ledger: Ledger, tries: int, seed: int
) -> Control:
    """Let random adapters answer in the place of all but the first, at the weights of the chosen trial.

    Answers are kept with the trials, so that a search that goes on does not ask again.

    Args:
        chosen: The trial that was taken.
        baseline: The first adapter alone.
        judge: Lets candidates answer; no adapters may be on its model.
        board: Scores trials.
        ledger: The trials.
        tries: How many draws to try, at least 1.
        seed: Seed of the draws.
    """
    trials = [
        Trial(
            number=CONTROL,
            candidate=chosen.candidate,
            answers=tuple(_answers(chosen.candidate, number, judge=judge, ledger=ledger, seed=seed)),
        )
        for number in range(tries)
    ]
    best = max(trials, key=lambda trial: board.exact(board.counts(trial)))
    return Control(
        tried=tries,
        score=board.score(best),
        languages=board.languages(best),
        gain=board.difference(baseline, best),
        difference=board.difference(best, chosen),
    )


def _answers(candidate: Candidate, number: int, *, judge: Judge, ledger: Ledger, seed: int) -> Sequence[str | None]:
    text = json.dumps([candidate.document(), number], sort_keys=True)
    name = f"control {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    known = ledger.baseline(name)
    if known is None:
        with random_adapters(judge.sources, seed=seed, number=number) as sources:
            rivals = judge.of(sources)
            with rivals.at_work(sources):
                known = list(next(iter(rivals([(candidate, rivals.every_row)], f"random adapter {number + 1}"))))
        ledger.keep_baseline(known, name)
    return known


@contextmanager
def random_adapters(sources: Sequence[AdapterSource], *, seed: int, number: int = 0) -> Iterator[list[AdapterSource]]:
    """Yield adapters of which all but the first are random, as long as the context lasts.

    Args:
        sources: The adapters.
        seed: Seed of the draws.
        number: Which of several draws.
    """
    with TemporaryDirectory(prefix="adaptermix-") as folder:
        found = [sources[0]]
        for place, source in enumerate(sources[1:], start=1):
            own = Path(folder) / f"random-{place}"
            own.mkdir()
            state = source.read()
            key = f"control {number} {place}"
            modules = {
                path: replace(module, update=random_update(module.update, seed=seed, key=key, module=path))
                for path, module in state.modules.items()
            }
            write_adapter(own, replace(state, modules=modules), compact=True)
            found.append(open_adapter(own))
        yield found


def random_update(update: LowRank, *, seed: int, key: str, module: str) -> LowRank:
    """Return an update of the same shape, rank and Frobenius norm with Gaussian entries in both factors.

    Args:
        update: The update whose place it takes.
        seed: Seed of the draws.
        key: What tells apart draws of one seed.
        module: Path of the module.

    Shapes: [out in] of rank r gives [out in] of rank r, float64, scale 1.
    """
    out, into = update.shape
    b = _gaussian(seed, f"{key} b", module, (out, update.rank))
    a = _gaussian(seed, f"{key} a", module, (update.rank, into))
    size = norm(LowRank(b=b, a=a))
    return LowRank(b=b * (norm(update.to(torch.float64)) / size), a=a)


def _gaussian(seed: int, key: str, module: str, shape: tuple[int, int]) -> Tensor:
    draws = uniform(seed, key, module, first=0, shape=shape).double()
    found: Tensor = torch.special.ndtri(draws + 2.0**-25)  # uniform draws are multiples of 2^-24 from 0 on
    return found
