"""A training step of a fused LoRA, beside that of a plain LoRA and of input-level fusion (both in one text).

Goals: at most .7 times the time of input-level fusion at equal lengths, and with sources that are kept at most 1.15
times that of a plain LoRA; memory no more than that of a plain LoRA and the source states.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def make(arguments: argparse.Namespace, fused: bool) -> Any:
    """Return a model with a LoRA on queries and values."""
    from peft import LoraConfig, inject_adapter_in_model

    from adaptermix.fusion.lora import FusionConfig
    from adaptermix.fusion.sources import ATTENTION
    from adaptermix.models import linear_names, load_base

    base = load_base(arguments.base, device=arguments.device, dtype="float32")
    names = [name for name in linear_names(base.model) if name in (*ATTENTION["query"], *ATTENTION["value"])]
    kind = FusionConfig if fused else LoraConfig
    inject_adapter_in_model(kind(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=names), base.model)
    return base.model.train()


def step_of(
    model: Any, batch: dict[str, torch.Tensor], before: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """Return a training step on a batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        before()
        output = model(**batch)
        states = output.logits if hasattr(output, "logits") else output.last_hidden_state
        states.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None]) -> float:
    """Return the seconds of a step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a source, and of a target")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    from adaptermix.fusion.sources import Fuser, read_sources

    plain, fused = make(arguments, fused=False), make(arguments, fused=True)
    generator = torch.Generator().manual_seed(0)

    def batch(length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(10, 1000, (arguments.rows, length), generator=generator).to(plain.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    target, source, both = batch(arguments.length), batch(arguments.length), batch(2 * arguments.length)
    fuser = Fuser(fused)
    kept = read_sources(fused, source)

    def fresh() -> None:
        fuser.use(None)
        fuser.use(read_sources(fused, source))

    steps = {
        "plain LoRA": step_of(plain, target),
        "fused, sources kept": step_of(fused, target, lambda: fuser.use(kept)),
        "fused, sources read": step_of(fused, target, fresh),
        "input-level fusion": step_of(plain, both),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):  # the first is for warming up
        for name, step in steps.items():
            seconds = timed(step)
            if turn:
                times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    document = {
        "threads": torch.get_num_threads(),
        "seconds per step, medians": medians,
        "kept beside plain (goal 1.15)": medians["fused, sources kept"] / medians["plain LoRA"],
        "read beside input-level (goal .7)": medians["fused, sources read"] / medians["input-level fusion"],
        "bytes of source states": sum(states.numel() * states.element_size() for states in kept.states.values()),
    }
    print(json.dumps(document))  # noqa: T201


if __name__ == "__main__":
    main()
