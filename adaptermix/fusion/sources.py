"""What a model makes of a source text, kept for the pass over the target."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """States of source texts, and where they stand beside the target.

    Args:
        states: By the path of the block that they are for.
        mask: Which tokens count.
        start: Place in the target of the first place of the source; negative where the source is longer.
    """

    states: Mapping[str, Float[Tensor, "rows others width"]]
    mask: Bool[Tensor, "rows others"]
    start: Integer[Tensor, " rows"]

    def beside(self, start: Tensor) -> Sources:
        """Return the same beside other targets."""
        return replace(self, start=start)


def _first(mask: Tensor) -> Tensor:
    return mask.long().argmax(-1)


def _last(mask: Tensor) -> Tensor:
    return mask.shape[-1] - 1 - mask.flip(-1).long().argmax(-1)


ALIGNMENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "position": lambda source, target: _first(target) - _first(source),
    "end": lambda source, target: _last(target) - _last(source),
    "index": lambda source, _target: torch.zeros(len(source), dtype=torch.long, device=source.device),
}
"""Where a source begins in the target: first tokens together, last tokens together, or place by place, padding too."""


def starts(
    alignment: str, source: Bool[Tensor, "rows others"], target: Bool[Tensor, "rows tokens"]
) -> Integer[Tensor, " rows"]:
    """Return the place in each target of the first place of its source.

    Args:
        alignment: Name of an alignment.
        source: Which tokens of the source count.
        target: Which tokens of the target's prompt count; those of an answer behind it do not.
    """
    return ALIGNMENTS[alignment](source.bool(), target.bool())


def block_of(path: str) -> str:
    """Return the path of the block that a module lies in.

    Raises:
        ValueError: it lies in none.

    Example:
        >>> block_of("model.layers.3.self_attn.q_proj")
        'model.layers.3'
    """
    found = _BLOCK.match(path)
    if found is None:
        raise ValueError(f"a fused module must lie in a numbered block, and {path!r} does not")
    return found[1]


def fused_modules(model: nn.Module) -> dict[str, Any]:
    """Return the modules of a model that can fuse, by path."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "fusion_sources")}


@torch.no_grad()
def read_sources(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    norm: bool = True,
    offset: int = 0,
    run: Callable[[], Any] | None = None,
) -> Sources:
    """Let the model without its adapters read source texts, in evaluation mode, and keep what its blocks see.

    Args:
        model: A model with fused LoRAs.
        batch: What the tokenizer gave.
        norm: States as the fused modules see them, behind a norm that stands before them; else those of the residual
            stream, as the release has them (in models without such a norm both are one).
        offset: 0 for what goes into a block, as the release has it; 1 for what comes out of it, as the paper says (with
            `norm` what the next block's modules see, and of the last block its plain output).
        run: Runs the model, if not by `model(**batch)`.

    Raises:
        ValueError: no module of the model fuses, or an offset that is neither.

    Reference: FLARE, section 3.2; the release takes the state before block i for block i.
    """
    if offset not in (0, 1):
        raise ValueError(f"the offset of sources must be 0 or 1, got {offset}")
    modules = fused_modules(model)
    if not modules:
        raise ValueError("no module of the model fuses")
    firsts: dict[str, Any] = {}
    readers = _readers(model)
    for path, module in modules.items():
        if module in readers:
            firsts.setdefault(block_of(path), module)
    named, paths = dict(model.named_modules()), list(firsts)
    caught: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for place, block in enumerate(paths):
            is_last = place + 1 == len(paths)
            if offset and (is_last or not norm):
                handle = named[block].register_forward_hook(partial(_catch_output, caught, block))
            else:
                where = firsts[paths[place + offset]] if norm else named[block]
                handle = where.register_forward_pre_hook(partial(_catch_input, caught, block), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_plain(model))
        (run or (lambda: model(**batch)))()
    mask = batch["attention_mask"].bool()
    return Sources(
        states={block: states.detach() for block, states in caught.items()},
        mask=mask,
        start=torch.zeros(len(mask), dtype=torch.long, device=mask.device),
    )


def _readers(model: Any) -> set[nn.Module]:
    """Return the modules that read a text: of an encoder-decoder those of its encoder."""
    if getattr(model.config, "is_encoder_decoder", False):
        return set(model.get_encoder().modules())
    return set(model.modules())


def _catch_input(
    caught: dict[str, Tensor], block: str, _module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]
) -> None:
    caught[block] = given[0] if given else named["hidden_states"]


def _catch_output(caught: dict[str, Tensor], block: str, _module: nn.Module, _given: Any, output: Any) -> None:
    caught[block] = output if isinstance(output, Tensor) else output[0]


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Let a model be without its adapters and in evaluation mode."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer in enabled:
            layer._disable_adapters = True
        yield
    finally:
        for layer in enabled:
            layer._disable_adapters = False
        for module, training in modes:
            module.training = training


@contextmanager
def fused(model: nn.Module, sources: Sources | None) -> Iterator[Callable[[], int]]:
    """Let a model's passes fuse with sources; a backward pass that computes activations anew belongs in the block too.

    Yields what tells in how many modules that happened, since a model whose passes do not reach them learns nothing.

    Args:
        model: A model with fused LoRAs.
        sources: Of the batch; None for plain LoRAs.
    """
    modules = fused_modules(model)
    count = 0

    def counted() -> int:
        return count

    def note() -> None:
        nonlocal count
        count += 1

    def begin(_module: nn.Module, _given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        cache = named.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        for module in modules.values():
            module.fusion_past = past

    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        for path, module in modules.items():
            module.fusion_past = 0
            states = None if sources is None else sources.states.get(block_of(path))
            if sources is not None and states is not None:
                module.fusion_sources = (states, sources.mask, sources.start, note)
        yield counted
    finally:
        handle.remove()
        for module in modules.values():
            module.fusion_sources = None
