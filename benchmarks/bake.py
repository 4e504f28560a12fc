"""Writing a LoRA into a bf16 checkpoint, beside copying the same bytes on the same disk.

Goals: at most 1.3 times the time of the copy; peak memory at most that of the two largest tensors and half a gigabyte
above that of the process before it began.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
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


def synced(path: Path) -> None:
    """Wait until a folder's files are on the disk, for both sides alike."""
    for file in path.rglob("*.safetensors"):
        with file.open("rb") as handle:
            import os

            os.fsync(handle.fileno())


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write; default a temporary folder")
    arguments = parser.parse_args()
    from adaptermix import BakeSettings, bake

    sizes = {"layers": arguments.layers, "hidden": arguments.hidden, "vocabulary": arguments.vocabulary}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        base, adapter = make(folder, **sizes)
        largest = 2 * arguments.vocabulary * arguments.hidden
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        copies, bakes = [], []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            shutil.copytree(base, folder / "copy")
            synced(folder / "copy")
            copies.append(time.perf_counter() - start)
            shutil.rmtree(folder / "copy")
            start = time.perf_counter()
            bake(BakeSettings(base=str(base), adapter=[str(adapter)], out=str(folder / "out")))
            synced(folder / "out")
            bakes.append(time.perf_counter() - start)
            shutil.rmtree(folder / "out")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        document = {
            "bytes": (base / "model.safetensors").stat().st_size,
            "copy, seconds": copies,
            "bake, seconds": bakes,
            "ratio, medians": sorted(bakes)[len(bakes) // 2] / sorted(copies)[len(copies) // 2],
            "largest tensor": largest,
            "peak before": before,
            "peak after": after,
        }
    print(json.dumps(document))  # noqa: T201


if __name__ == "__main__":
    main()
