"""Steps of training a stack, in turn with the passes that they are made of.

Stage 1: a step, against the sum of its two forward passes and one backward pass on the same batches. Goal: at most
1.15 times the seconds. Stage 2: a step with stored states of the teacher, against one that runs the teacher. Goal: the
latter takes at least 1.5 times the seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from adaptermix.models.eval_mode import loras_off
from adaptermix.options import StackSettings
from adaptermix.tasks.data.texts import texts_of
from adaptermix.training.lora import factors, inject
from adaptermix.training.losses.stacking import state_loss
from adaptermix.training.runner import Run
from adaptermix.training.sampler import Sampler
from adaptermix.training.stack import StackObjective


def prepared(arguments: argparse.Namespace, folder: Path) -> StackObjective:
    """Return stage 1 with its models loaded and the LoRA in."""
    settings = StackSettings(
        base=arguments.base,
        encoder=arguments.encoder,
        texts=arguments.texts,
        out=str(folder / "out"),
        dropout=0.0,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        rows=":1000",
        dtype=arguments.dtype,
        allow_tested=True,
    )
    run = Run(settings=settings)
    objective = StackObjective(run)
    objective.read()
    run.base = objective.load()
    objective.prepare()
    inject(run.base.model, settings, seed=0, head=run.base.head_modules)
    return objective


def timed(work: Callable[[], Tensor], model: Any) -> float:
    """Run forward and backward, and return the seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = work()
    if loss.requires_grad:
        loss.backward()
    float(loss.detach())
    for parameter in factors(model).values():
        parameter.grad = None
    return time.perf_counter() - start


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        objective = prepared(arguments, Path(folder))
    model, states, read = objective.run.base.model, objective.states, objective.texts_read
    loss_of, stored = objective.loss(), states.teacher(read.teacher[:1])
    sampler = Sampler(groups=[range(len(read.student))], batch_size=arguments.batch_size, seed=0)
    seconds: dict[str, list[float]] = {"step": [], "passes": [], "stage 2, stored": [], "stage 2, live teacher": []}
    for number in range(arguments.rounds + 1):
        rows = sampler.batch(number)
        student, teacher = ([side[row] for row in rows] for side in (read.student, read.teacher))
        stored = states.teacher(teacher)

        def of_teacher(ids: list[list[int]] = teacher) -> Tensor:
            with torch.no_grad(), loras_off(model), states.embedding.bypassed():
                return states.run(objective.own_tokenizer, ids).sum()

        def of_student(ids: list[list[int]] = student, targets: Tensor = stored) -> Tensor:
            return state_loss(states.student(ids), targets)

        def live(ids: list[list[int]] = student, others: list[list[int]] = teacher) -> Tensor:
            return state_loss(states.student(ids), states.teacher(others))

        found = {
            "step": timed(lambda number=number: loss_of(number).loss, model),
            "passes": timed(of_teacher, model) + timed(of_student, model),
            "stage 2, stored": timed(of_student, model),
            "stage 2, live teacher": timed(live, model),
        }
        for name, value in found.items() if number else ():  # the first round warms up
            seconds[name].append(value)
    steps = [one / other for one, other in zip(seconds["step"], seconds["passes"], strict=True)]
    lives = [
        one / other for one, other in zip(seconds["stage 2, live teacher"], seconds["stage 2, stored"], strict=True)
    ]
    document = {
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "step / passes": {"median": round(statistics.median(steps), 2), "max": round(max(steps), 2), "goal": 1.15},
        "live / stored": {"median": round(statistics.median(lives), 2), "min": round(min(lives), 2), "goal": 1.5},
        "texts": len(texts_of(arguments.texts)[0]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(document, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
