"""Training side by side with a plain loop of peft and transformers: tokens per second and peak memory.

Goals: `train-task` at least as fast as the plain loop, 1.3 times with batches by length on rows of mixed lengths;
`train-align` at the middle at least 1.8 times a full forward with `output_hidden_states` (see `scripts/bench align`).

Every side trains on the same rows once, so the ratio is that of their times, and each meets its longest batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SIDES = ("plain loop", "ours", "ours, by length")


def texts(tokenizer: Any, rows: int, mixed: bool) -> list[tuple[list[int], list[int]]]:
    """Return prompt and answer ids of random tokens: prompts of 30, or of 8 to 200 tokens, answers of 12."""
    generator = torch.Generator().manual_seed(0)
    lengths = (8 * 25 ** torch.rand(rows, generator=generator)).int().tolist() if mixed else [30] * rows
    highest = len(tokenizer)
    drawn = [torch.randint(3, highest, (length + 12,), generator=generator).tolist() for length in lengths]
    return [(ids[:-12], ids[-12:]) for ids in drawn]


def plain_steps(base: Any, examples: list[Any], settings: Any) -> Any:
    """The loop that one writes with peft and transformers: padding on the right, the model's own loss, AdamW."""
    from peft import LoraConfig, get_peft_model

    from adaptermix.training.sampler import Sampler

    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(base.model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    sampler = Sampler(groups=[range(len(examples))], batch_size=settings.batch_size, seed=0)

    def step(number: int, learn: bool = True) -> int:
        rows = [examples[row] for row in sampler.batch(number)]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, mask, labels = [], [], []
        for prompt, answer in rows:
            spare = width - len(prompt) - len(answer)
            ids.append([*prompt, *answer, *[0] * spare])
            mask.append([1] * (width - spare) + [0] * spare)
            labels.append([-100] * len(prompt) + answer + [-100] * spare)
        batch = {
            name: torch.tensor(x, device=base.device)
            for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
        }
        model(**batch).loss.backward()
        if learn:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
        return sum(map(sum, mask))

    return step


def our_steps(base: Any, examples: list[Any], settings: Any) -> Any:
    """The trainer's own steps."""
    from adaptermix.training.checkpoint import Workplace
    from adaptermix.training.lora import inject
    from adaptermix.training.task import Answers, TaskLoss
    from adaptermix.training.trainer import Trainer

    answers = Answers(base, examples)
    inject(base.model, settings, seed=0)
    base.model.train()
    trainer = Trainer(base.model, settings, steps=10_000, workplace=Workplace(Path(settings.out), {}))
    loss = TaskLoss(answers, settings)

    def step(number: int, learn: bool = True) -> int:
        if learn:
            return int(trainer._step(loss)["tokens"])
        loss(number).loss.backward()
        base.model.zero_grad()
        return 0

    return step


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Run one side in this process."""
    from adaptermix.models.base import load_base
    from adaptermix.options import TaskSettings

    base = load_base(arguments.base, device=arguments.device, dtype=arguments.dtype)
    settings = TaskSettings(
        base=arguments.base,
        task="slots",
        train=["-"],
        out="unused",
        batch_size=arguments.batch_size,
        group_by_length=arguments.side == SIDES[2],
    )
    examples = texts(base.tokenizer, arguments.steps * arguments.batch_size, arguments.mixed)
    step = (plain_steps if arguments.side == SIDES[0] else our_steps)(base, examples, settings)
    step(0, learn=False)  # the first batch warms up
    start, tokens = time.perf_counter(), 0
    for number in range(arguments.steps):
        tokens += step(number)
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = (
        torch.cuda.max_memory_allocated()
        if base.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"tokens per second": tokens / seconds, "peak GB": peak / 1e9}


def main() -> None:
    """Run every side in a process of its own, in turns, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="causal language model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=12, help="batches of the one pass over the rows")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixed", action="store_true", help="rows of 20 to 212 tokens, else of 42")
    parser.add_argument("--side", choices=SIDES, help="one side, in this process")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))  # noqa: T201
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, capture_output=True, check=True, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, found[side][-1], file=sys.stderr, flush=True)  # noqa: T201
    ratios = {
        side: statistics.median(
            one["tokens per second"] / two["tokens per second"]
            for one, two in zip(found[side], found[SIDES[0]], strict=True)
        )
        for side in SIDES
    }
    memory = {side: one[0]["peak GB"] / found[SIDES[0]][0]["peak GB"] for side, one in found.items()}
    document = {"mixed": arguments.mixed, "times the plain loop": ratios, "times its memory": memory, "rounds": found}
    print(json.dumps(document, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
