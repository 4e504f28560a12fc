"""Which tensors of the base model a merge changes, and the layout of deltas in them."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters.base_weights import find_weight
from ..errors import ModelError
from ..io.checkpoint_files import Checkpoint
from .plan import MergePlan

_HEADS = ("lm_head", "embed_out")
_TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def weight_shape(plan: MergePlan, module: str) -> tuple[int, ...]:
    """Return the shape of the weight that a module's delta is added to, as the base model stores it."""
    header = plan.header(module)
    if header.layout.kind == "convolution":
        return (header.out, -1, *header.layout.kernel)
    return (header.into, header.out) if is_transposed(plan, module) else (header.out, header.into)


def is_transposed(plan: MergePlan, module: str) -> bool:
    """Return whether the base model stores a module's weight as [in out]."""
    kind = plan.header(module).layout.kind
    return kind == "embedding" or (kind == "linear" and plan.sources[0].meta.fan_in_fan_out)


def as_weight(delta: Tensor, shape: tuple[int, ...], *, transposed: bool) -> Tensor:
    """Return a delta [out in] in the shape of its weight in the base model, transposed if that is [in out]."""
    if len(shape) > 2:
        if delta.numel() != torch.Size(shape).numel():
            raise ModelError(
                f"the base's weight {list(shape)} must have as many entries as the delta {list(delta.shape)}, and has "
                "not. Give the base model that the adapters were trained on.",
                code="base.weight-size",
            )
        return delta.reshape(shape)
    return delta.T.contiguous() if transposed else delta


def untied(base: Checkpoint, plan: MergePlan) -> Checkpoint:
    """Return the base model with a separate output head if the plan changes a head that is tied to the embeddings.

    PEFT adapts only the head, not the embeddings, so a model with tied weights cannot equal the result.
    """
    aliases: dict[str, str] = {}
    for module in plan.modules:
        name = f"{module}.weight"
        if module.rpartition(".")[2] not in _HEADS or name in base.tensors:
            continue
        shape = (plan.header(module).out, plan.header(module).into)
        tables = [key for key, header in base.tensors.items() if key.endswith(_TABLES) and tuple(header.shape) == shape]
        if len(tables) == 1:
            aliases[name] = tables[0]
    if not aliases:
        return base
    tensors = {**base.tensors, **{name: base.tensors[table] for name, table in aliases.items()}}
    return replace(base, tensors=dict(sorted(tensors.items())), aliases=aliases)


def weight_names(plan: MergePlan, base: Checkpoint) -> dict[str, str]:
    """Return the weights of the base that a plan changes, as a mapping from weight name to module.

    Raises:
        ModelError: a module is not in the base model, or a changed embedding is also the output head.
    """
    names: dict[str, str] = {}
    for module in plan.modules:
        name = find_weight(base, module)
        if name in names:
            raise ModelError(
                f"modules '{names[name]}' and '{module}' must be two weights of the base model, and both are '{name}'. "
                "The adapters name one module in two ways.",
                code="into-base.weight-twice",
            )
        names[name] = module
    for module in plan.modules:
        header = plan.header(module)
        if header.layout.kind == "embedding" and header.into == _tied_rows(base):
            raise ModelError(
                f"module '{module}' is a table of embeddings that the base model {base.path} ties to its output head, "
                "but the adapter changes the embeddings only. Use another form.",
                code="into-base.tied-embedding",
            )
    return names


def _tied_rows(base: Checkpoint) -> int | None:
    """Return the vocabulary size if the output head of the base is tied to its embedding, else None."""
    if base.aliases:
        return None
    try:
        config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = config if isinstance(config, dict) else {}
    heads = [str(name) for name in config.get("architectures") or () if "ForCausalLM" in name or "LMHead" in name]
    rows = config.get("vocab_size")
    return rows if heads and config.get("tie_word_embeddings") is True and isinstance(rows, int) else None
