"""Merging LoRAs side by side with peft and mergekit: recompression, the whole command line, dense methods.

Goals: `recompress` at least 200 times as fast as peft's `svd`, the same delta to 1e-6; `cli` at most 3 times the time
that safetensors takes to read and write the same bytes (plus start-up) and 3 times the adapters' bytes + 0.4 GB of
memory; `ties` at least 20 times as fast as peft's `ties_svd`, at most k + 2 dense matrices, residual at most 1 % above
the least.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adaptermix.algebra import LowRank, Stack, concatenate, recompress, truncate
from adaptermix.methods.base import build

RANK = 16
# Llama-3-8B: (out, in) of the seven linear layers of a block
LLAMA = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def factors(out: int, into: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B [out r] and A [r in] with a spectrum that falls by a factor of ten, as trained LoRAs' do."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, RANK, generator=generator) / out**0.5 * torch.logspace(0, -1, RANK)
    a = torch.randn(RANK, into, generator=generator) / into**0.5
    return b.to(dtype), a.to(dtype)


def timed(work: Callable[[], Any], rounds: int = 1) -> tuple[float, Any]:
    """Return the least time of some rounds and the last result."""
    best, result = float("inf"), None
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def peft_layer(side: tuple[int, int], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Return a peft model of one linear layer with two adapters of scale 1."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(side[1], side[0], bias=False))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config, adapter_name="one")
        wrapped.add_adapter("two", config)
    layer = wrapped.base_model.model[0]
    for name, (b, a) in zip(("one", "two"), pairs, strict=True):
        layer.lora_A[name].weight.data.copy_(a)
        layer.lora_B[name].weight.data.copy_(b)
    return wrapped


def peft_merge(side: tuple[int, int], pairs: list[Any], **options: Any) -> tuple[float, torch.Tensor]:
    """Return how long peft's `add_weighted_adapter` takes, and its delta in float64."""
    wrapped = peft_layer(side, pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds, _ = timed(lambda: wrapped.add_weighted_adapter(["one", "two"], [0.9, 0.1], "merged", **options))
    layer = wrapped.base_model.model[0]
    return seconds, layer.lora_B["merged"].weight.double() @ layer.lora_A["merged"].weight.double()


def bench_recompress(_: argparse.Namespace) -> dict[str, Any]:
    """Two r = 16 LoRAs of 4096 x 4096 to rank 16."""
    side = (4096, 4096)
    pairs = [factors(*side, seed=seed) for seed in (1, 2)]
    updates = [LowRank(b=b, a=a) for b, a in pairs]
    ours, (merged, residual) = timed(lambda: recompress(concatenate(updates, [0.9, 0.1]), RANK), rounds=7)
    theirs, delta = peft_merge(side, pairs, combination_type="svd", svd_rank=RANK)
    own = merged.b.double() @ merged.a.double()
    # peft works in float32, so the optimum in float64 is the judge
    wide, _ = recompress(concatenate([update.to(torch.float64) for update in updates], [0.9, 0.1]), RANK)
    exact = wide.dense()
    return {
        "seconds": ours,
        "peft svd seconds": theirs,
        "times as fast": theirs / ours,
        "goal": 200,
        "residual": residual,
        "relative difference to float64 optimum": float((own - exact).norm() / exact.norm()),
        "peft's difference to it": float((delta - exact).norm() / exact.norm()),
        "relative difference to peft": float((own - delta).norm() / delta.norm()),
    }


def write_llama(folder: Path, seed: int, dtype: torch.dtype) -> int:
    """Write an adapter with the shapes of Llama-3-8B; return its bytes."""
    folder.mkdir(parents=True)
    tensors = {}
    made = {name: factors(*side, seed=seed * 100 + i, dtype=dtype) for i, (name, side) in enumerate(LLAMA.items())}
    for block in range(32):
        for name, (b, a) in made.items():
            key = f"base_model.model.model.layers.{block}.{name}"
            # other numbers in every block, without the time to draw them
            tensors[f"{key}.lora_A.weight"] = a.roll(block, 1).contiguous()
            tensors[f"{key}.lora_B.weight"] = b.roll(block, 0).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in LLAMA}),
        "base_model_name_or_path": "org/llama-3-8b-shaped",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (folder / "adapter_model.safetensors").stat().st_size


def process(command: list[str]) -> tuple[float, int]:
    """Run a process; return its wall time and its peak memory in bytes."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


STARTUP = "import torch, safetensors.torch"
OWN_STARTUP = "import adaptermix.cli, adaptermix.options, adaptermix.merging.request"
COPY = """
import sys, torch
from safetensors.torch import load_file, save_file
tensors = {}
for number, path in enumerate(sys.argv[1:3]):
    for name, tensor in load_file(path + "/adapter_model.safetensors").items():
        tensors[f"{number}.{name}"] = tensor.float()
save_file(tensors, sys.argv[3])
"""


def bench_cli(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole command line on two adapters of Llama-3-8B shapes, against reading and writing the same bytes."""
    found: dict[str, Any] = {"goals": {"times read and write": 3, "memory": "3 x adapters' bytes + 0.4 GB"}}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        size = sum(write_llama(folder / name, seed, torch.float32) for seed, name in enumerate(("task", "align"), 1))
        names = [str(folder / "task"), str(folder / "align")]
        for label, more in (("exact", []), ("rank 16", ["--rank", "16", "--max-residual", "1"])):
            rounds = []
            for number in range(arguments.rounds):
                startup, _ = process([sys.executable, "-c", STARTUP])
                own, _ = process([sys.executable, "-c", OWN_STARTUP])
                copy, _ = process([sys.executable, "-c", COPY, *names, str(folder / f"copy{number}")])
                (folder / f"copy{number}").unlink()
                out = str(folder / f"out{number}")
                command = [sys.executable, "-m", "adaptermix", "merge", *names, "--weights", "0.9", "--out", out]
                ours, peak = process([*command, "--quiet", *more])
                subprocess.run(["rm", "-r", out], check=True)
                io = copy - startup
                rounds.append((ours, startup, own, io, (ours - startup) / io, peak))
            ours, startup, own, io, ratio, peak = sorted(rounds, key=lambda entry: entry[4])[len(rounds) // 2]
            found[label] = {
                "seconds": ours,
                "start-up seconds": startup,
                "start-up with our imports, seconds": own,
                "read and write seconds": io,
                "(seconds - start-up) / read and write": ratio,
                "peak GB": peak / 1e9,
                "memory allowed GB": (3 * size + 0.4e9) / 1e9,
                "adapters GB": size / 1e9,
            }
    return found


MEMORY = """
import sys, torch
from adaptermix.algebra import LowRank, Stack, truncate
from adaptermix.methods.base import build
out, into, rank, method = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
method = build(method, {})
torch.randn(64, 64) @ torch.randn(64, 64)
truncate(torch.randn(600, 600), 4)
def peak():
    # not ru_maxrss, which a process inherits from the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak()
stack = Stack.of([LowRank(b=torch.randn(out, 16), a=torch.randn(16, into)) for _ in range(2)], [0.9, 0.1], seed=0)
truncate(method(stack).w, rank)
print((peak() - before) * 1024 / (4 * out * into))
"""


def dense_matrices(method: str, side: tuple[int, int]) -> float:
    """Return the peak memory of a dense merge and its truncation, in dense matrices, from a process of its own."""
    command = [sys.executable, "-c", MEMORY, str(side[0]), str(side[1]), str(RANK), method]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def bench_dense(arguments: argparse.Namespace) -> dict[str, Any]:
    """TIES and DARE on 4096 x 4096 against peft's dense SVD merges, and on the largest module of Llama-3-8B."""
    found: dict[str, Any] = {}
    side = (arguments.side, arguments.side)
    pairs = [factors(*side, seed=seed) for seed in (1, 2)]
    peers = {
        "ties": {"combination_type": "ties_svd", "density": 0.2},
        "dare-ties": {"combination_type": "dare_ties_svd", "density": 0.5},
    }
    for name, options in peers.items():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        updates = [LowRank(b=b.to(device), a=a.to(device)) for b, a in pairs]
        method = build(name, {"density": options["density"]})
        stack = Stack.of(updates, [0.9, 0.1], seed=0)
        merge, merged = timed(lambda method=method, stack=stack: method(stack), rounds=3)
        ours, low = timed(lambda method=method, stack=stack: truncate(method(stack).w, RANK), rounds=3)
        theirs, delta = peft_merge(side, pairs, svd_rank=RANK, **options)
        dense = merged.w.double().cpu()
        entry = {
            "seconds": ours,
            "of which merging": merge,
            "peft seconds": theirs,
            "times as fast": theirs / ours,
            "goal": 20,
            "residual": low.residual,
            "bound on the excess over the optimum": low.excess,
        }
        if name == "ties":
            peer = float((dense - delta).norm() / dense.norm())
            entry["peft's residual"] = peer
            entry["residual / peft's exact SVD's - 1"] = low.residual / peer - 1
            entry["mergekit ties seconds, merging only"] = mergekit_ties([u.dense().cpu() for u in updates])
        found[name] = entry
    large = LLAMA["mlp.down_proj"]
    updates = [LowRank(b=b, a=a) for b, a in (factors(*large, seed=seed) for seed in (1, 2))]
    stack = Stack.of(updates, [0.9, 0.1], seed=0)
    for name in ("ties", "dare-ties", "della"):
        method = build(name, {})
        seconds, low = timed(lambda method=method: truncate(method(stack).w, RANK))
        found[f"{name} {large[0]} x {large[1]}"] = {
            "seconds": seconds,
            "residual": low.residual,
            "bound on the excess over the optimum": low.excess,
            "peak in dense matrices (k + 2 = 4 allowed)": dense_matrices(name, large),
        }
    return found


def mergekit_ties(deltas: list[torch.Tensor]) -> float | None:
    """Return how long mergekit takes to merge the dense deltas, without any SVD."""
    try:
        from mergekit.merge_methods.api import merge_tensors
    except ImportError:
        return None
    tensors = [torch.zeros_like(deltas[0]), *deltas]
    parameters = {"weight": {1: 0.9, 2: 0.1}, "density": 0.2}
    return timed(lambda: merge_tensors(tensors, "ties", parameters=parameters, base_index=0))[0]


def bench_cuda(_: argparse.Namespace) -> dict[str, Any]:
    """A dense method on a GPU, against reading the factors, writing the dense matrix once and the SVD's products."""
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    side = LLAMA["mlp.down_proj"]
    pairs = [factors(*side, seed=seed) for seed in (1, 2)]
    updates = [LowRank(b=b.cuda(), a=a.cuda()) for b, a in pairs]
    stack = Stack.of(updates, [0.9, 0.1], seed=0)
    least, _ = timed(lambda: updates[0].dense() + updates[1].dense(), rounds=10)
    for name in ("ties", "dare-ties", "della"):
        method = build(name, {})
        merge, merged = timed(lambda method=method: method(stack), rounds=10)
        cut, _ = timed(lambda merged=merged: truncate(merged.w, RANK), rounds=5)
        found[name] = {"merging": merge, "SVD": cut, "dense products and one write": least, "ratio": merge / least}
    return found


PARTS = {"cli": bench_cli, "recompress": bench_recompress, "dense": bench_dense, "cuda": bench_cuda}


def main() -> None:
    """Run the parts and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--scratch", default=None, help="folder for the adapters of the command-line part")
    arguments = parser.parse_args()
    found = {part: PARTS[part](arguments) for part in arguments.parts}
    print(json.dumps({"threads": torch.get_num_threads(), **found}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
