"""Checks of a dry run: a model's modules without their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..adapters import AdapterSource
from ..models.base import fingerprint_of, model_kind
from ..models.blocks import block_index, blocks, keep_blocks
from ..models.devices import pick_device, pick_dtype
from ..models.kinds import loader_of
from ..models.pretrained import load_config, model_of_config
from ..models.quantization import loading_options
from ..options import AlignSettings, JointSettings, TrainingSettings
from .frozen_adapter import attach_on
from .lora import check_reach, count_trainable, inject
from .start_from import fit_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def aligned_layer(model: nn.Module, settings: AlignSettings | JointSettings, *, whole: bool) -> int:
    """Return the number of blocks below the alignment loss.

    Args:
        model: The base model.
        settings: The run's settings.
        whole: Whether another objective reaches the blocks above.

    Raises:
        ModelError: the model has not as many.
        PlanError: blocks are chosen that the loss does not reach.
    """
    layer = block_index(settings.layer, len(blocks(model)[1]))
    check_reach(settings, layer, whole=whole)
    return layer


def outline(reference: str) -> PreTrainedModel:
    """Return a base model on the meta device, which takes next to no memory or time.

    Raises:
        ModelError: no such model, or a kind that is not handled.
    """
    kind = model_kind(reference)
    config = load_config(reference)
    with torch.device("meta"):
        return model_of_config(config, loader_of(kind, config), reference=reference, dtype=torch.float32)


def count_lora(settings: TrainingSettings, start: AdapterSource | None = None) -> int:
    """Return how many parameters the LoRA of a run would have, without a head.

    Raises:
        AdapterMixError: no such model, device or quantisation; a layer, targets or blocks that the model has not or
            that the loss does not reach; an adapter to train on top of, or to start from, that is damaged or of
            another base.
    """
    device = pick_device(settings.device)
    loading_options(settings.quantize, device, pick_dtype(settings.dtype, device))
    model = outline(settings.base)
    attach_on(model, settings, headed=False)
    start = start and fit_start(model, start, settings, fingerprint=fingerprint_of(settings.base))
    if isinstance(settings, AlignSettings | JointSettings):
        whole = isinstance(settings, JointSettings)
        layer = aligned_layer(model, settings, whole=whole)
        if not whole:
            keep_blocks(model, layer)
    bare = settings.model_copy(update={"init": "kaiming", "gradient_checkpointing": False})
    inject(model, bare, seed=0, start=start)
    return count_trainable(model)
