"""Writing a LoRA into a bf16 checkpoint, beside copying the same bytes on the same disk.

Goals: at most 1.3 times the time of the copy, medians of runs that take turns, both until all is on the disk; memory
at most that of the two largest tensors and half a gigabyte above that of the process after its imports, at its peak in
a process of its own. Counted is anonymous memory: pages of mapped files are the system's to take back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


def make(folder: Path, *, layers: int, hidden: int, vocabulary: int) -> tuple[Path, Path]:
    """Write a random Llama-shaped checkpoint in bf16 and a rank 16 LoRA on all its linear layers."""
    from safetensors.torch import save_file

    inner = int(3.5 * hidden)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    factors: dict[str, torch.Tensor] = {}
    kinds = {"q": (hidden, hidden), "k": (hidden // 4, hidden), "v": (hidden // 4, hidden), "o": (hidden, hidden)}
    places = {f"self_attn.{name}_proj": shape for name, shape in kinds.items()}
    places |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for layer in range(layers):
        for place, (out, into) in places.items():
            name = f"model.layers.{layer}.{place}"
            shapes[f"{name}.weight"] = (out, into)
            factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(16, into) * 0.01
            factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 16) * 0.01
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file(
        {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}, base / "model.safetensors"
    )
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden}
    (base / "config.json").write_text(json.dumps(config))
    save_file(factors, adapter / "adapter_model.safetensors")
    targets = [place.rpartition(".")[2] for place in places]
    settings: dict[str, Any] = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    return base, adapter


def sync(folder: Path) -> None:
    """Wait until a folder's files are on the disk."""
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def timed(write: Callable[[Path], object], out: Path) -> float:
    """Return the seconds that it takes to write a folder onto the disk."""
    os.sync()  # nothing of before is still to be written
    start = time.perf_counter()
    write(out)
    sync(out)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def anonymous() -> int:
    """Return the bytes of this process's memory that no file backs (RssAnon)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def peak(write: Callable[[], object]) -> int:
    """Return by how much anonymous memory grew while something was done, at most, looked at every millisecond."""
    before, done = anonymous(), threading.Event()
    found = [before]

    def look() -> None:
        while not done.wait(0.001):
            found.append(anonymous())

    looking = threading.Thread(target=look)
    looking.start()
    write()
    found.append(anonymous())
    done.set()
    looking.join()
    return max(found) - before


def largest(base: Path) -> list[int]:
    """Return the bytes of a checkpoint's tensors, the largest first."""
    from adaptermix.io.checkpoint_files import open_checkpoint

    return sorted((header.size for header in open_checkpoint(base).tensors.values()), reverse=True)


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", help="where to write; default a temporary folder")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # what the child measures: a base and an adapter
    arguments = parser.parse_args()
    from adaptermix import BakeSettings, bake

    def baked(base: Path, adapter: Path, out: Path) -> object:
        return bake(BakeSettings(base=str(base), adapter=[str(adapter)], out=str(out)))

    if arguments.peak:
        base, adapter = map(Path, arguments.peak)
        print(peak(lambda: baked(base, adapter, base.parent / "out")))  # noqa: T201
        return
    sizes = {"layers": arguments.layers, "hidden": arguments.hidden, "vocabulary": arguments.vocabulary}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        base, adapter = make(folder, **sizes)
        copies, bakes = [], []
        for _ in range(arguments.rounds):
            copies.append(timed(partial(shutil.copytree, base), folder / "copy"))
            bakes.append(timed(partial(baked, base, adapter), folder / "out"))
        child = [sys.executable, __file__, "--peak", str(base), str(adapter)]
        grown = int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        document = {
            "bytes": (base / "model.safetensors").stat().st_size,
            "threads": torch.get_num_threads(),
            "copy, seconds": copies,
            "bake, seconds": bakes,
            "ratio of medians": statistics.median(bakes) / statistics.median(copies),
            "ratio, goal": 1.3,
            "peak, anonymous bytes": grown,
            "peak, goal": sum(largest(base)[:2]) + 2**29,
        }
    print(json.dumps(document))  # noqa: T201


if __name__ == "__main__":
    main()
