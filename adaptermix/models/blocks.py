"""The blocks of a model, for every architecture: which they are, and running the first ones only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

from torch import nn

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the model's blocks: the outermost module list with one entry per layer.

    Raises:
        ModelError: there is no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} must have a list of {count} blocks, and has no such list.", code="model.no-blocks"
        )
    return min(lists, key=lambda item: item[0].count("."))


def block_index(layer: int | Literal["middle", "last"], count: int, *, option: str = "--layer") -> int:
    """Return the number of blocks to run, 1 to n, for a layer: a number, `middle` (n/2, rounded down) or `last`.

    Raises:
        ModelError: the layer is not among 1 to n.
    """
    named = {"middle": max(1, count // 2), "last": count}
    number = named[layer] if isinstance(layer, str) else layer
    if not 1 <= number <= count:
        raise ModelError(
            f"{option} must be from 1 to {count} for this base model, got {number}.", code="model.block-index"
        )
    return number


def keep_blocks(model: PreTrainedModel, count: int) -> None:
    """Remove all blocks after the first `count` permanently, which saves their memory and time."""
    path, stack = blocks(model)
    _set_blocks(model, path, stack[:count])


@contextmanager
def first_blocks(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Run only the model's first `count` blocks while the context is open."""
    path, stack = blocks(model)
    if count == len(stack):
        yield
        return
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None)
    _set_blocks(model, path, stack[:count])
    try:
        yield
    finally:
        _set_blocks(model, path, stack)
        if types:
            _set_types(text, types)


def _set_blocks(model: PreTrainedModel, path: str, stack: nn.ModuleList) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, stack)
    text = model.config.get_text_config()
    text.num_hidden_layers = len(stack)
    if types := getattr(text, "layer_types", None):
        _set_types(text, types[: len(stack)])


def _set_types(text: PreTrainedConfig, types: Sequence[str]) -> None:
    # Mamba, Falcon-H1 and Bamba compute the list from the number of blocks, so it cannot be set.
    with suppress(AttributeError):
        text.layer_types = types


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, including quantised ones and Conv1D, judged by its attributes."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def linear_names(model: PreTrainedModel, chosen: range | None = None) -> list[str]:
    """Return the last names of all linear layers in the blocks, or in a range of blocks; heads are left out."""
    stack = [block for number, block in enumerate(blocks(model)[1]) if chosen is None or number in chosen]
    return sorted(
        {name.rsplit(".", 1)[-1] for block in stack for name, module in block.named_modules() if is_linear(module)}
    )
