"""Checkpoints made on the spot: a folder of safetensors, single or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {"self_attn.q_proj": (12, 8), "self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 20)}


def decoder(
    *, layers: int = 2, seed: int = 0, prefix: str = "model.", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights of a small decoder: three matrices per block, a norm, embeddings and a head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{prefix}layers.{n}.{m}": shape for n in range(layers) for m, shape in SHAPES.items()}
    shapes |= {f"{prefix}embed_tokens": (50, 8), "lm_head": (50, 8)}
    weights = {f"{path}.weight": torch.randn(*s, generator=generator).to(dtype) for path, s in shapes.items()}
    return weights | {f"{prefix}layers.{n}.norm.weight": torch.ones(8, dtype=dtype) for n in range(layers)}


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1) -> Path:
    """Write the tensors as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {}
    for n in range(shards):
        name = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[n::shards]}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def orthogonal(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
