"""Contexts that run a model without dropout, without its LoRAs, or without the base model's dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable dropout while the context is open."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # Modes are restored one by one: the base model's dropout may be off while a LoRA's is on.
        for module, training in modes.items():
            module.training = training


@contextmanager
def loras_off(model: nn.Module) -> Iterator[None]:
    """Disable all LoRAs in the model while the context is open."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trainable = {parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trainable:
            parameter.requires_grad_(True)


def train_loras_only(model: nn.Module) -> None:
    """Switch the base model's dropout off permanently and the dropout of its LoRAs on.

    Blocks with activation checkpointing must stay in training mode, or transformers would keep their activations; their
    dropout is set to zero instead. PEFT skips the dropout of a DoRA unless its layer is in training mode.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or name.rpartition(".")[0].endswith("lora_dropout"):
            module.training = True
        elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            for attribute, value in vars(module).items():
                if "dropout" in attribute and isinstance(value, float):
                    setattr(module, attribute, 0.0)
