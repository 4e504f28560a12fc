"""Tuned copies of a tiny Llama, and checkpoints cut into shards, without the code under test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[str, Tensor, torch.Generator], Tensor]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def everywhere(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Noise on every tensor."""
    return tensor + 0.02 * torch.randn(tensor.shape, generator=generator)


def linear_only(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Noise on the matrices inside the blocks."""
    return everywhere(name, tensor, generator) if "layers" in name and tensor.ndim == 2 else tensor


def tune(base: Path, folder: Path, *, seed: int = 1, change: Change = everywhere) -> Path:
    """Write a copy of a model with changed weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: change(name, tensor, generator) for name, tensor in tensors_of(base).items()}
    return rewrite(base, folder, tensors)


def rewrite(base: Path, folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1) -> Path:
    """Write a model with these weights and the base's other files."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    where = {}
    for n in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key].contiguous() for key in sorted(tensors)[n::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def logits(model: Any) -> Tensor:
    """Logits on fixed tokens, in float64."""
    tokens = torch.arange(2, 40)[None] % 97 + 3
    with torch.no_grad():
        found: Tensor = model.double()(tokens).logits
    return found
