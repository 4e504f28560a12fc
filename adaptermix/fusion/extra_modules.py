"""Extra modules of fusions next to the LoRAs: they are trained in full, like heads, and saved with the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from .mixup import MIXUP, Mixup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTION, MIXING = "fusion_projection", "fusion_mixup"


def add_parts(
    model: PreTrainedModel, settings: Mapping[str, object], *, latent: int = 0, seed: int = 0
) -> tuple[str, ...]:
    """Add the extra modules of a fusion to a model, and return their names.

    Args:
        model: The model.
        settings: The fusion's settings, by PEFT's names.
        latent: Width of the states of another encoder, if these are the sources.
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
    """Remove the modules."""
    for name in (PROJECTION, MIXING):
        if hasattr(model, name):
            delattr(model, name)
