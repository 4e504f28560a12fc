"""Steps of alignment training, two kinds in turn on the same pairs, both with a LoRA on all linear layers.

`--objective contrastive`: a step that stops at the middle block, against a full forward with `output_hidden_states` and
the same loss (the peer's LoRA is in every block, as peft makes it by default). Goal: at least 1.8 times the tokens/s.

`--objective distil`: a step of distillation, whose targets were computed once, against a contrastive step. Goal: at
most 0.6 times the seconds. The seconds that the targets take are reported too.

With `--fit least-squares` (or mean-shift): the seconds of an alignment in closed form, of 500 pairs a file, without
loading the model. Goal: at most 60 s on two cores for four files and a model such as multilingual-e5-small.
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

from adaptermix import train_align
from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.blocks import block_index, keep_blocks
from adaptermix.models.pooling import masked_mean
from adaptermix.options import AlignSettings
from adaptermix.tasks.data import read_pairs
from adaptermix.training.align import AlignLoss
from adaptermix.training.distil import DistilLoss
from adaptermix.training.lora import factors, inject
from adaptermix.training.losses import contrastive_loss
from adaptermix.training.sampler import Sampler


def full_forward(
    base: BaseModel, settings: AlignSettings, pairs: list[Any], layer: int
) -> Callable[[int], tuple[Any, int]]:
    """The peer: run everything, take one hidden state."""
    sampler = Sampler(groups=[range(len(pairs))], batch_size=settings.batch_size, seed=settings.seed)

    def loss(number: int) -> tuple[Any, int]:
        rows = sampler.batch(number)
        sides, tokens = [], 0
        for texts in ([pairs[r].source for r in rows], [pairs[r].target for r in rows]):
            batch = base.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(base.device)
            states = base.model(**batch, output_hidden_states=True).hidden_states[layer]
            sides.append(masked_mean(states, batch["attention_mask"]))
            tokens += int(batch["attention_mask"].sum())
        return contrastive_loss(*sides, temperature=settings.temperature), tokens

    return loss


def step(loss_of: Callable[[int], tuple[Any, int]], model: Any, number: int) -> tuple[float, int, float]:
    """Forward and backward; return loss, tokens and seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss, tokens = loss_of(number)[:2]
    loss.backward()
    value = float(loss.detach())
    for parameter in factors(model).values():
        parameter.grad = None
    return value, tokens, time.perf_counter() - start


def closed_form(base: str, pairs: list[str], *, fit: str, dtype: str) -> dict[str, Any]:
    """Fit an alignment without gradients, and return its time and what it explains."""
    with TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        settings: dict[str, Any] = {"base": base, "pairs": pairs, "out": out, "fit": fit, "dtype": dtype}
        document = train_align(AlignSettings(**settings, rows=":500")).document()
    return {
        "seconds": round(document["seconds"], 1),
        "goal": 60,
        "pairs": document["pairs"],
        "held_out": document["held_out"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pairs", nargs="+", required=True)
    parser.add_argument("--objective", choices=MEASURES, default="contrastive")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--fit", choices=["gradient", "least-squares", "mean-shift"], default="gradient")
    arguments = parser.parse_args()
    if arguments.fit != "gradient":
        found = closed_form(arguments.base, arguments.pairs, fit=arguments.fit, dtype=arguments.dtype)
        print(json.dumps(found, indent=1))  # noqa: T201
        return
    pairs, _ = read_pairs(arguments.pairs, rows=":300")
    print(json.dumps(MEASURES[arguments.objective](arguments, pairs), indent=1))  # noqa: T201


def prepared(arguments: argparse.Namespace, *, cut: bool, **more: Any) -> tuple[BaseModel, AlignSettings, int]:
    """Return a base model with its LoRA in, the settings, and the number of the aligned block."""
    settings = AlignSettings(
        base=arguments.base,
        pairs=arguments.pairs,
        out="unused",
        dropout=0.0,
        batch_size=arguments.batch_size,
        balance="rows",
        **more,
    )
    base = load_base(arguments.base, dtype=arguments.dtype)
    layer = block_index("middle", base.layers)
    if cut:
        keep_blocks(base.model, layer)
    inject(base.model, settings, seed=0)
    return base, settings, layer


def in_turn(
    runs: dict[str, tuple[Callable[[int], Any], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[tuple[int, float]]]]:
    """Run steps of all kinds in turn; return their losses, and tokens and seconds without the first round."""
    losses: dict[str, list[float]] = {name: [] for name in runs}
    steps: dict[str, list[tuple[int, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, (loss_of, model) in runs.items():
            value, tokens, seconds = step(loss_of, model, number)
            losses[name].append(value)
            if number:  # the first round warms up
                steps[name].append((tokens, seconds))
    return losses, steps


def contrastive(arguments: argparse.Namespace, pairs: list[Any]) -> dict[str, Any]:
    """Measure a step that stops at the middle against a full forward."""
    ours, settings, layer = prepared(arguments, cut=True)
    peer, _, _ = prepared(arguments, cut=False)
    runs = {
        "stops at the middle": (AlignLoss(ours, pairs, settings), ours.model),
        "full forward": (full_forward(peer, settings, pairs, layer), peer.model),
    }
    peer.model.train()
    losses, steps = in_turn(runs, arguments.rounds)
    speeds = {name: [tokens / seconds for tokens, seconds in found] for name, found in steps.items()}
    ratios = [one / other for one, other in zip(*speeds.values(), strict=True)]
    return {
        "tokens_per_second": {name: round(statistics.median(found), 1) for name, found in speeds.items()},
        "ratio": {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2), "goal": 1.8},
        "largest difference of the losses": max(abs(one - other) for one, other in zip(*losses.values(), strict=True)),
        "layer": layer,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def distil(arguments: argparse.Namespace, pairs: list[Any]) -> dict[str, Any]:
    """Measure a step of distillation against a contrastive step."""
    ours, settings, layer = prepared(arguments, cut=True, objective="distil")
    peer, of_peer, _ = prepared(arguments, cut=True)
    start = time.perf_counter()
    loss = DistilLoss(ours, pairs, settings)
    targets = time.perf_counter() - start
    runs = {"distil": (loss, ours.model), "contrastive": (AlignLoss(peer, pairs, of_peer), peer.model)}
    _, steps = in_turn(runs, arguments.rounds)
    seconds = {name: [second for _, second in found] for name, found in steps.items()}
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    return {
        "seconds_per_step": {name: round(statistics.median(found), 3) for name, found in seconds.items()},
        "ratio": {"median": round(statistics.median(ratios), 2), "max": round(max(ratios), 2), "goal": 0.6},
        "seconds_of_targets": round(targets, 2),
        "pairs": len(pairs),
        "layer": layer,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


MEASURES = {"contrastive": contrastive, "distil": distil}


if __name__ == "__main__":
    main()
