"""Searching a merge weight on dev data, side by side with a loop of peft and transformers that merges per trial.

Goals: 20 trials of a pair at least 5 times as fast as `add_weighted_adapter` (its exact `cat`) and generation per
trial, with the same scores; what a trial does beyond its forward passes at most 2 % of it; a race (20 orders of the
rows) ends with a weight whose interval holds the best score of the whole grid, for at most 35 % of its row evaluations.

The race over orders of the rows takes the answers that the whole grid gave; `--race` runs and times one on the model.
The peer may do some of the trials, evenly spaced (`--peer-trials`), and is held against as many of ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


def settings_of(arguments: argparse.Namespace, out: str, *, race: bool = False) -> Any:
    """Return the settings of the search."""
    from adaptermix.options import SearchSettings

    spaced = [round(weight, 4) for weight in np.linspace(arguments.least, 1.0, arguments.trials).tolist()]
    return SearchSettings(
        adapters=arguments.adapters,
        base=arguments.base,
        task=arguments.task,
        dev=arguments.dev,
        rows=arguments.rows,
        grid=arguments.grid or spaced,
        space=arguments.space,
        race=race,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        dtype=arguments.dtype,
        device=arguments.device,
        out=out,
    )


@contextmanager
def timed_passes(model: Any) -> Iterator[list[float]]:
    """Add up the time inside the model's forward passes."""
    spent = [0.0]
    forward = model.forward

    @functools.wraps(forward)  # transformers asks a forward for the names of its arguments
    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return forward(*given, **named)
        finally:
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            spent[0] += time.perf_counter() - start

    model.forward = timed
    try:
        yield spent
    finally:
        model.forward = forward


def ours(base: Any, settings: Any) -> dict[str, Any]:
    """Search, and tell times, scores and answers of every trial."""
    from adaptermix.weight_search.prepare import prepare
    from adaptermix.weight_search.run import search_with

    prepared = prepare(settings)
    start = time.perf_counter()
    with timed_passes(base.model) as spent:
        result = search_with(base, prepared, settings)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "in forward passes": spent[0],
        "in trials": sum(trial.seconds for trial in result.trials),
        "scores": [score.value for score in result.scores],
        "trials": result.trials,
        "baseline": result.baseline,
        "prepared": prepared,
    }


def peer(base: Any, settings: Any, prepared: Any, grid: list[float], batch_size: int) -> dict[str, Any]:
    """What one writes with peft: merge per weight, generate in batches of rows of like length, score."""
    from peft import PeftModel

    from adaptermix.models.generate import Limits, in_words, pad_left
    from adaptermix.tasks import get_template
    from adaptermix.weight_search.significance import TrialScorer
    from adaptermix.weight_search.trials import Trial

    task, rows = prepared.task, prepared.rows
    template = get_template(task, prepared.prompt)
    prompts = [template.encode(task.fields(row), base.tokenizer) for row in rows]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    limits = Limits(max_new_tokens=settings.max_new_tokens, one_line=task.one_line)
    stops = sorted(limits.stops(base))
    metric = task.metrics(rows)[0]
    scorer = TrialScorer(metric, [task.language(row) for row in rows], rows, objective="mean", seed=0)
    start = time.perf_counter()
    model = PeftModel.from_pretrained(base.model, settings.adapters[0], adapter_name="first").eval()
    model.load_adapter(settings.adapters[1], adapter_name="second")
    scores = []
    for weight in grid:
        pairs = [(n, w) for n, w in (("first", weight), ("second", round(1 - weight, 12))) if w > 0]
        model.add_weighted_adapter([n for n, _ in pairs], [w for _, w in pairs], "merged", combination_type="cat")
        model.set_adapter("merged")
        answers = [""] * len(prompts)
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = pad_left([prompts[row] for row in chosen], base.tokenizer.pad_token_id, base.device)
            with torch.inference_mode():
                output = model.generate(
                    **batch,
                    max_new_tokens=limits.max_new_tokens,
                    do_sample=False,
                    eos_token_id=stops,
                    pad_token_id=base.tokenizer.pad_token_id,
                )
            ids = output[:, batch["input_ids"].shape[1] :].tolist()
            ended = [line[: next((i for i, token in enumerate(line) if token in stops), None)] for line in ids]
            for row, text in zip(chosen, in_words(base, ended), strict=True):
                answers[row] = text
        model.delete_adapter("merged")
        model.set_adapter("first")
        trial = Trial(number=0, candidate=prepared.searched.candidates[0], answers=tuple(answers))
        scores.append(scorer.exact(scorer.counts(trial)))
    seconds = time.perf_counter() - start
    model.unload()
    return {"seconds": seconds, "scores": scores}


def races(found: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Race over the answers of the whole grid, with the rows of each language in another order per seed."""
    from adaptermix.weight_search.racing import SuccessiveHalving
    from adaptermix.weight_search.significance import TrialScorer
    from adaptermix.weight_search.trial_store import TrialStore

    prepared, every = found["prepared"], found["trials"]
    task, rows = prepared.task, prepared.rows
    languages = [task.language(row) for row in rows]
    shares, within, values = [], [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        order = np.arange(len(rows))
        for language in set(languages):
            places = np.array([place for place, name in enumerate(languages) if name == language])
            order[places] = rng.permutation(places)
        scorer = TrialScorer(
            task.metrics(rows)[0], languages, [rows[place] for place in order], objective="mean", seed=seed
        )
        answers = {trial.candidate.weights: [trial.answers[place] for place in order] for trial in every}
        baseline = type(found["baseline"])(
            number=-1,
            candidate=found["baseline"].candidate,
            answers=tuple(found["baseline"].answers[place] for place in order),
        )

        def answers_of(asked: Any, answers: Any = answers) -> Any:
            return [[answers[trial.candidate.weights][place] for place in places] for trial, places in asked]

        with tempfile.TemporaryDirectory() as folder:
            store = TrialStore(
                (Path(folder) / "log", "race"), searched=prepared.searched, settings={}, limit=len(every)
            )
            SuccessiveHalving(scorer, languages, answers_of, baseline=baseline, size=len(every)).run(store)
            raced = store.trials()
        score = {trial.candidate.weights: scorer.score(trial) for trial in raced if trial.is_whole}
        best = max(score.values(), key=lambda one: one.value)
        top = max(
            scorer.exact(
                scorer.counts(
                    baseline.__class__(number=0, candidate=t.candidate, answers=tuple(answers[t.candidate.weights]))
                )
            )
            for t in every
        )
        shares.append(sum(trial.rows for trial in raced) / (len(every) * len(rows)))
        within.append(best.low <= top <= best.high)
        values.append(top - best.value)
    return {
        "share of rows": max(shares),
        "within the interval": sum(within),
        "seeds": seeds,
        "largest loss": max(values),
    }


def arguments_given() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="causal language model")
    parser.add_argument("--adapters", nargs=2, required=True, help="task adapter and alignment adapter")
    parser.add_argument("--task", default="slots")
    parser.add_argument("--dev", nargs="+", required=True)
    parser.add_argument("--rows")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--least", type=float, default=0.5, help="least weight of the first adapter; the most is 1")
    parser.add_argument("--grid", type=float, nargs="+", help="weights to try instead")
    parser.add_argument("--space", default="simplex", help="free: the grid is for each adapter")
    parser.add_argument("--batch-size", type=int, help="rows per pass of ours; default: as many as fit")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--race", action="store_true", help="also search with a race, and time it")
    parser.add_argument("--peer-trials", type=int, help="how many of the trials the peer does; 0 for none; default all")
    parser.add_argument("--peer-batch-size", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    """Print one JSON document."""
    arguments = arguments_given()
    from adaptermix.models.base import load_base
    from adaptermix.tasks.heads.from_adapters import head_of
    from adaptermix.weight_search.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(arguments, f"{folder}/out")
        prepared = prepare(settings)
        head = head_of(prepared.task, prepared.sources, prepared.rows)
        base = load_base(arguments.base, device=arguments.device, dtype=arguments.dtype, head=head)
        found = ours(base, settings)
        count = len(found["scores"])
        print(f"ours: {found['seconds']:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
        document: dict[str, Any] = {
            "rows": len(prepared.rows),
            "trials": count,
            "ours, seconds": found["seconds"],
            "beyond forward passes": 1 - found["in forward passes"] / found["seconds"],
            "races": races(found, arguments.seeds),
        }
        if arguments.race:
            raced = ours(base, settings_of(arguments, f"{folder}/raced", race=True))
            document["race, seconds"] = raced["seconds"]
            document["race, share of rows"] = sum(t.rows for t in raced["trials"]) / (count * len(prepared.rows))
            document["race, largest difference of whole trials"] = differences(found, raced)
            print(f"race: {raced['seconds']:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
        chosen = np.linspace(0, count - 1, count if arguments.peer_trials is None else arguments.peer_trials)
        places = sorted({round(place) for place in chosen.tolist()})
        if places and arguments.space == "simplex" and head is None:
            grid = [found["trials"][place].candidate.weights[0] for place in places]
            other = peer(base, settings, prepared, grid, arguments.peer_batch_size)
            document["peft, trials"] = len(places)
            document["peft, seconds per trial"] = each = other["seconds"] / len(places)
            document["ratio"] = each * count / found["seconds"]
            if arguments.race:
                document["ratio of the race"] = each * count / document["race, seconds"]
            scores = [found["scores"][place] for place in places]
            gaps = [abs(one - two) for one, two in zip(scores, other["scores"], strict=True)]
            document["largest difference of scores"] = max(gaps)
        document["scores"] = found["scores"]
    print(json.dumps(document))  # noqa: T201


def differences(found: dict[str, Any], raced: dict[str, Any]) -> float:
    """Return how far scores of trials that a race ran to the end are from those of the same weights without it."""
    known = {trial.candidate.weights: score for trial, score in zip(found["trials"], found["scores"], strict=True)}
    pairs = zip(raced["trials"], raced["scores"], strict=True)
    return max(abs(score - known[trial.candidate.weights]) for trial, score in pairs if trial.is_whole)


if __name__ == "__main__":
    main()
