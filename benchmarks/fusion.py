"""A training step of a fused LoRA beside that of a plain LoRA, of X-Mixup and of input-level fusion (both in one text).

Goals: at most .7 times the time of input-level fusion at equal lengths, and with sources that are kept at most 1.15
times that of a plain LoRA; memory no more than that of a plain LoRA and the source states.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], None]


def make(arguments: argparse.Namespace, way: str) -> Any:
    """Return a base model with a LoRA on queries and values, and what else a way of fusing has."""
    from peft import LoraConfig, inject_adapter_in_model

    from adaptermix.fusion.extra_modules import add_parts
    from adaptermix.fusion.lora import FusionConfig
    from adaptermix.fusion.sources import FUSING
    from adaptermix.models.base import load_base
    from adaptermix.models.blocks import linear_names
    from adaptermix.models.head_forms import HEAD_FORMS, Head

    head = Head(form=HEAD_FORMS["classes"], labels=("a", "b", "c"))
    base = load_base(arguments.base, device=arguments.device, dtype=arguments.dtype, head=head)
    names = [name for name in linear_names(base.model) if name in FUSING]
    settings = {"fusion": "x-mixup" if way == "X-Mixup" else "add"}
    width = base.model.config.get_text_config().hidden_size
    parts = add_parts(base.model, settings, latent=width if way.endswith("MT)") else 0)
    kind = FusionConfig if way.startswith("fused") else LoraConfig
    more = {"target_modules": names, "modules_to_save": [*base.head_modules, *parts]}
    inject_adapter_in_model(kind(r=arguments.rank, lora_alpha=2 * arguments.rank, **more), base.model)
    base.model.train()
    return base


def step_of(base: Any, batch: dict[str, torch.Tensor], before: Step = lambda: None, more: Any = None) -> Step:
    """Return a training step on a batch."""
    trained = [p for p in base.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        before()
        loss = base.model(**batch).logits.float().square().mean()
        (loss + more() if more else loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps_of(arguments: argparse.Namespace, way: str) -> tuple[Step, int, int]:
    """Return a step, the tokens that it trains on, and the bytes of the source states that are kept."""
    from adaptermix.fusion.extra_modules import MIXING, PROJECTION
    from adaptermix.fusion.mixup import Mixer, consistency
    from adaptermix.fusion.sources import Fuser, Sources, block_of, fused_modules, read_sources

    base = make(arguments, way)
    model, rows, length = base.model, arguments.rows, arguments.length
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(10, 1000, (rows, count), generator=generator).to(base.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    target, source = batch(length), batch(length)
    if way == "plain LoRA":
        return step_of(base, target), rows * length, 0
    if way == "input-level fusion":
        return step_of(base, batch(2 * length)), 2 * rows * length, 0
    if way == "X-Mixup":
        mixer = Mixer(base, base.layers // 2, MIXING)
        held: dict[str, Any] = {}

        def read() -> None:
            mixer.use(None)
            held["loss"] = model(**source).logits.float().square().mean()
            held["source"] = mixer.passed()
            mixer.use(held["source"])

        more = lambda: held["loss"] + consistency(held["source"], mixer.passed())  # noqa: E731
        return step_of(base, target, read, more), 2 * rows * length, 0
    fuser = Fuser(model)
    run = lambda: base.model.base_model(**source)  # noqa: E731
    kept = read_sources(model, source, run=run)
    size = sum(states.numel() * states.element_size() for states in kept.states.values())
    if way.endswith("MT)"):
        latent = next(iter(kept.states.values())).clone()
        paths = [block_of(path) for path in fused_modules(model)]

        def project() -> None:
            states = dict.fromkeys(paths, model.get_submodule(PROJECTION)(latent))
            fuser.use(Sources(states=states, mask=kept.mask, lead=kept.lead))

        return step_of(base, target, project), rows * length, latent.nbytes
    if way == "fused, sources kept":
        return step_of(base, target, lambda: fuser.use(kept)), rows * length, size

    def fresh() -> None:
        fuser.use(None)
        fuser.use(read_sources(model, source, run=run))

    return step_of(base, target, fresh), 2 * rows * length, size


WAYS = (
    *("plain LoRA", "fused, sources kept", "fused, latents kept (FLARE-MT)", "fused, sources read"),
    *("X-Mixup", "input-level fusion"),
)


def timed(step: Step) -> float:
    """Return the seconds of a step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(arguments: argparse.Namespace, way: str) -> dict[str, int]:
    """Return the most memory of steps above that of the loaded model, and the bytes of source states."""
    step, _, size = steps_of(arguments, way)
    step()  # the optimizer's state, and what is loaded late
    if torch.cuda.is_available() and arguments.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return {"peak": torch.cuda.max_memory_allocated() - before, "states": size}
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for _ in range(3):
        step()
    return {"peak": _status("VmHWM") - before, "states": size, "resident": _status("VmHWM")}


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="an encoder, or a decoder that can have a classification head")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a source, and of a target")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(json.dumps(peak(arguments, arguments.peak_of)))  # noqa: T201
        return
    made = {way: steps_of(arguments, way) for way in WAYS}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(arguments.rounds + 1):  # the first is for warming up
        for name, (step, _, _) in made.items():
            seconds = timed(step)
            if turn:
                times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    tokens = {name: count for name, (_, count, _) in made.items()}
    del made
    memory = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", way]
        memory[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    of_states = memory["fused, sources kept"]["states"]
    key = "resident" if "resident" in memory["plain LoRA"] else "peak"
    bound = memory["plain LoRA"][key] + of_states
    document = {
        "threads": torch.get_num_threads(),
        "seconds per step, medians": medians,
        "tokens read per step": tokens,
        "beside plain": {name: median / medians["plain LoRA"] for name, median in medians.items()},
        "kept beside plain (goal 1.15)": medians["fused, sources kept"] / medians["plain LoRA"],
        "read beside input-level (goal .7)": medians["fused, sources read"] / medians["input-level fusion"],
        "memory, bytes": memory,
        "memory of kept beside plain and states (goal 1)": memory["fused, sources kept"][key] / bound,
    }
    print(json.dumps(document))  # noqa: T201


if __name__ == "__main__":
    main()
