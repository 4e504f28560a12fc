"""Modules that a model gets beside fused LoRAs: they are trained whole, as heads are, and travel with the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .mixup import MIXUP, Mixup

PROJECTION, MIXING = "fusion_projection", "fusion_mixup"


def add_parts(model: Any, settings: Mapping[str, Any], *, latent: int = 0, seed: int = 0) -> tuple[str, ...]:
    """Give a model the modules that a fusion has beside its LoRAs, and return their names.

    Args:
        model: The model.
        settings: The fusion's settings, by PEFT's names.
        latent: Width of the states of another encoder, where they are the sources.
        seed: Seed of their weights.
    """
    width = model.config.get_text_config().hidden_size
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, nn.Module] = {PROJECTION: nn.Linear(latent, width)} if latent else {}
        if settings["fusion"] == MIXUP:
            parts[MIXING] = Mixup(width)
    for name, part in parts.items():
        model.add_module(name, part.to(like.device, model.dtype).requires_grad_(False))
    return tuple(parts)


def remove_parts(model: nn.Module) -> None:
    """Take them off again."""
    for name in (PROJECTION, MIXING):
        if hasattr(model, name):
            delattr(model, name)
