"""The LoRA of a stack, which acts next to the weights of the model on top."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from ..adapters import AdapterSource, open_adapter
from ..adapters.paths import fitted
from ..errors import IncompatibleAdapters
from .stack import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _add(update: tuple[Tensor, Tensor], _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    a, b = update
    return output + ((inputs[0].to(a.dtype) @ a.T) @ b.T).to(output.dtype)


def add_own_adapter(model: nn.Module, source: AdapterSource) -> None:
    """Add the LoRA of a stack to its model for good, next to the weights, which may be quantised.

    Merged into 4-bit weights it would be lost (the paper, footnote 3).

    Args:
        model: The model on top.
        source: The adapter.

    Raises:
        IncompatibleAdapters: it has modules that the model does not have.
    """
    modules = dict(model.named_modules())
    source = fitted(source, modules)
    like = cast("PreTrainedModel", model)
    for path in source.modules:
        if path not in modules:
            raise IncompatibleAdapters(
                f"the adapter {source.path} of a stack must fit its base model, which lacks module {path!r}.",
                code="stack.adapter",
            )
        update = source.load(path)
        factors = (update.a.to(like.device, like.dtype), (update.b * update.scale).to(like.device, like.dtype))
        modules[path].register_forward_hook(partial(_add, factors))


def open_own_adapter(folder: Path) -> AdapterSource:
    """Return the LoRA of a stack's folder.

    Raises:
        AdapterFormatError: it is missing or damaged.
    """
    return open_adapter(folder / ADAPTER)
