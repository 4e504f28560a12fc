"""A control for gains of a search: random adapters replace all adapters but the first.

A gain that random adapters give too is not due to the training of the other adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters import AdapterSource, open_adapter, write_adapter
from ..algebra import LowRank, norm
from ..algebra.draws import uniform
from ..io.temporary import temporary_folder
from .candidate_model import CandidateModel
from .decision import Control
from .significance import TrialScorer
from .space import Candidate
from .trial_store import TrialStore
from .trials import Answers, Trial

_NUMBER = -2
"""Number of all trials with random adapters, which are not trials of the search."""


def control_of(
    chosen: Trial,
    baseline: Trial,
    *,
    model: CandidateModel,
    scorer: TrialScorer,
    store: TrialStore,
    tries: int,
    seed: int,
) -> Control:
    """Score the chosen weights with random adapters instead of all adapters but the first.

    Of several draws the best one counts. The answers are stored with the trials, so that a resumed search does not
    compute them again.

    Args:
        chosen: The chosen trial.
        baseline: The trial of the first adapter alone.
        model: Computes answers of candidates. No adapter may be attached to it.
        scorer: Scores trials.
        store: The trials.
        tries: Number of draws, at least 1.
        seed: Seed of the draws.
    """
    trials = [
        Trial(
            number=_NUMBER,
            candidate=chosen.candidate,
            answers=tuple(_answers(chosen.candidate, number, model, store, seed)),
        )
        for number in range(tries)
    ]
    best = max(trials, key=lambda trial: scorer.exact(scorer.counts(trial)))
    return Control(
        tried=tries,
        score=scorer.score(best),
        languages=scorer.languages(best),
        gain=scorer.difference(baseline, best),
        difference=scorer.difference(best, chosen),
    )


def _answers(candidate: Candidate, number: int, model: CandidateModel, store: TrialStore, seed: int) -> Answers:
    text = json.dumps([candidate.document(), number], sort_keys=True)
    name = f"control {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    answers = store.saved_answers(name)
    if answers is None:
        with random_adapters(model.sources, seed=seed, number=number) as sources:
            rivals = model.with_sources(sources)
            with rivals.attached_to_model(sources):
                answers = list(next(rivals([(candidate, rivals.every_row)], f"random adapter {number + 1}")))
        store.save_answers(answers, name)
    return answers


@contextmanager
def random_adapters(sources: Sequence[AdapterSource], *, seed: int, number: int = 0) -> Iterator[list[AdapterSource]]:
    """Yield the first adapter, and a random adapter instead of each other one.

    Args:
        sources: The adapters.
        seed: Seed of the draws.
        number: Number of the draw; each number gives other random adapters.
    """
    with temporary_folder() as folder:
        adapters = [sources[0]]
        for index, source in enumerate(sources[1:], start=1):
            path = folder / f"random-{index}"
            path.mkdir()
            state = source.read()
            key = f"control {number} {index}"
            modules = {
                name: replace(module, update=random_update(module.update, seed=seed, key=key, module=name))
                for name, module in state.modules.items()
            }
            write_adapter(path, replace(state, modules=modules), compact=True)
            adapters.append(open_adapter(path))
        yield adapters


def random_update(update: LowRank, *, seed: int, key: str, module: str) -> LowRank:
    """Return an update of the same shape, rank and Frobenius norm with Gaussian entries in both factors.

    The draw depends on `seed`, `key` and the path of the module.

    Shapes: [out in] of rank r gives [out in] of rank r, float64, scale 1.
    """
    out, into = update.shape
    b = _gaussian(seed, f"{key} b", module, (out, update.rank))
    a = _gaussian(seed, f"{key} a", module, (update.rank, into))
    size = norm(LowRank(b=b, a=a))
    return LowRank(b=b * (norm(update.to(torch.float64)) / size), a=a)


def _gaussian(seed: int, key: str, module: str, shape: tuple[int, int]) -> Tensor:
    draws = uniform(seed, key, module, first=0, shape=shape).double()
    gaussian: Tensor = torch.special.ndtri(draws + 2.0**-25)  # ndtri(0) is -inf, and draws are multiples of 2^-24.
    return gaussian
