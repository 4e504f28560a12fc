"""Adapters and base models made on the spot, without the code under test."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def key(module: str, factor: str) -> str:
    """Name of a factor's tensor in PEFT's file."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def write_raw(folder: Path, config: object, tensors: Mapping[str, Tensor]) -> Path:
    """Write the two files of an adapter folder as given, however wrong they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def write_lora(
    folder: Path,
    modules: Mapping[str, tuple[int, int, int]],
    *,
    alpha: float | Mapping[str, float] = 8,
    rslora: bool = False,
    seed: int = 0,
    base: str | None = "org/base",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> dict[str, Tensor]:
    """Write a PEFT LoRA folder with random factors.

    Args:
        folder: Where.
        modules: (out, in, rank) per module path; unequal ranks go into `rank_pattern`.
        alpha: One alpha, or one per module path (`alpha_pattern`).
        rslora: Scale alpha/sqrt(r) in place of alpha/r.
        seed: Seed of the factors.
        base: Base model's name.
        dtype: Storage dtype.
        config: Further entries of the config, or other values of those above.

    Returns:
        The exact delta of each module in float64, from the stored factors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for module, (out, into, rank) in modules.items():
        a = (torch.randn(rank, into, generator=generator) / math.sqrt(into)).to(dtype)
        b = (torch.randn(out, rank, generator=generator) / math.sqrt(rank)).to(dtype)
        tensors[key(module, "A")], tensors[key(module, "B")] = a, b
        own = alpha[module] if isinstance(alpha, Mapping) else alpha
        scale = own / rank**0.5 if rslora else own / rank
        deltas[module] = scale * (b.double() @ a.double())
    ranks = {module: rank for module, (_, _, rank) in modules.items()}
    first = next(iter(ranks.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first,
        "lora_alpha": next(iter(alpha.values())) if isinstance(alpha, Mapping) else alpha,
        "use_rslora": rslora,
        "rank_pattern": {re.escape(m): rank for m, rank in ranks.items() if rank != first},
        "alpha_pattern": {re.escape(m): a for m, a in alpha.items()} if isinstance(alpha, Mapping) else {},
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "bias": "none",
        "lora_dropout": 0.1,
        "inference_mode": True,
    }
    write_raw(folder, settings | config, tensors)
    return deltas


def adapter_deltas(folder: Path) -> dict[str, Tensor]:
    """Return the deltas of an adapter folder whose patterns are full paths, in float64, without the code under test."""
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    plain = {
        name: {pattern.replace("\\", "").lstrip("^"): value for pattern, value in config[name].items()}
        for name in ("rank_pattern", "alpha_pattern")
    }
    deltas = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = plain["rank_pattern"].get(module, config["r"])
        alpha = plain["alpha_pattern"].get(module, config["lora_alpha"])
        assert a.shape[0] == rank
        scale = alpha / rank**0.5 if config["use_rslora"] else alpha / rank
        deltas[module] = scale * (tensors[key(module, "B")].double() @ a.double())
    return deltas


def tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Save a random Llama of 4 layers, hidden size 32 and 101 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def load_base(folder: Path) -> Any:
    """Load a base model for evaluation, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@contextmanager
def peft_noise() -> Iterator[None]:
    """Silence the one warning that transformers 5.23 gives whenever PEFT wraps a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def peft_lora(base: Path, folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Save a LoRA that PEFT itself made on a base model, with random factors.

    Args:
        base: The base model's folder.
        folder: Where to save.
        seed: Seed of the factors.
        settings: Arguments of `peft.LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(seed)
    with peft_noise():
        model = get_peft_model(load_base(base), LoraConfig(**{"task_type": "CAUSAL_LM"} | settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(folder)
    return folder


def load_with_peft(base: Path, adapter: Path, **options: Any) -> Any:
    """Load an adapter with PEFT alone, for evaluation; any warning but the known one is an error."""
    from peft import PeftModel

    with peft_noise():
        return PeftModel.from_pretrained(load_base(base), adapter, **options).eval()


def tokens() -> Tensor:
    """Return a small batch of token ids for the tiny model."""
    return torch.arange(3, 27).reshape(2, 12)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return a model's logits on `tokens()`."""
    return model(input_ids=tokens()).logits


def without_card_hash(manifest: bytes) -> bytes:
    """Return a manifest without the hash of its card, which has the folder's name."""
    return re.sub(rb'\s*"card_sha256": "[0-9a-f]{64}",?', b"", manifest)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return everything under a folder, hidden files too: bytes per file, None per folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """Save a random GPT-2 of 2 layers and 101 tokens, whose linear layers keep their weights as [in out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=101, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("weight") and parameter.ndim == 2:
                    parameter.mul_(8)  # so that an adapter has something to change
    model.save_pretrained(folder)
    return folder


def train_by_chance(model: Any, *, seed: int = 0) -> None:
    """Move every trainable parameter of a PEFT model off its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise.tanh())
            else:
                parameter.add_(noise * 0.2)


@contextmanager
def peft_chatter() -> Iterator[None]:
    """Silence what PEFT says of kinds that it supports in part: no such warning is about loading wrongly."""
    with peft_noise(), warnings.catch_warnings():
        for message in (
            ".*save_embedding_layers.*",
            ".*Model with `tie_word_embeddings=True`.*",
            ".*groups > 1.*",
            ".*merging LoRA weights won't be possible.*",
            ".*have invalid shape: .*lora_B.bias.*",  # PEFT 0.21 takes every bias inside a LoRA for a broken matrix
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def peft_kind(model: Any, folder: Path, *, seed: int = 0, task_type: str | None = "CAUSAL_LM", **settings: Any) -> Path:
    """Save an adapter of any kind that PEFT itself made on a model and chance trained.

    Args:
        model: The base model; PEFT changes it.
        folder: Where to save.
        seed: Seed of the training.
        task_type: PEFT's task type.
        settings: Arguments of `peft.LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model

    with peft_chatter():
        wrapped = get_peft_model(model, LoraConfig(task_type=task_type, **settings))
        train_by_chance(wrapped, seed=seed)
        wrapped.save_pretrained(folder)
    return folder


def wrap_with_peft(model: Any, adapter: Path, **options: Any) -> Any:
    """Load an adapter with PEFT alone on a model that is at hand, for evaluation."""
    from peft import PeftModel

    with peft_chatter():
        return PeftModel.from_pretrained(model, adapter, **options).eval()
