"""A model's states of source texts, recorded for the pass over the target."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from ..errors import InvalidValueError
from ..models.encoders import has_decoder

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

FUSING = frozenset(
    (
        *("query", "q_proj", "q", "q_lin", "query_proj"),
        *("value", "v_proj", "v", "v_lin", "value_proj"),
    )
)
"""Names of the linear layers that fuse: queries and values, as in the paper and in the release."""
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """States of source texts, and their alignment with the target.

    Args:
        states: States by the path of the block that uses them.
        mask: Which tokens count.
        lead: Offset of the source's first token from the target's first token that is not padding; negative if the
            source starts before it.
        counts_padding: Whether the offset is relative to the first position instead, which may be padding.
    """

    states: Mapping[str, Float[Tensor, "rows others width"]]
    mask: Bool[Tensor, "rows others"]
    lead: Integer[Tensor, " rows"]
    counts_padding: bool = False

    def align(self, alignment: str, prompts: Sequence[int]) -> Sources:
        """Return the same sources, aligned with targets.

        Args:
            alignment: Name of an alignment.
            prompts: Tokens of each target's prompt, without the answer.
        """
        lengths = torch.tensor(list(prompts), device=self.mask.device)
        if alignment == LAST:
            return self._repeat_last(lengths)
        lead = ALIGNMENTS[alignment](self.mask, lengths)
        return replace(self, lead=lead, counts_padding=alignment == "index")

    def _repeat_last(self, lengths: Tensor) -> Sources:
        longest = int(lengths.max())
        rows, ends = torch.arange(len(self.mask), device=self.mask.device), _last(self.mask)
        return Sources(
            states={path: states[rows, ends, None].expand(-1, longest, -1) for path, states in self.states.items()},
            mask=(torch.arange(longest, device=self.mask.device)[None] < lengths[:, None]) & self.mask.any(-1)[:, None],
            lead=torch.zeros_like(lengths),
        )

    def part(self, first: int, count: int) -> Sources:
        """Return the sources of `count` rows from `first` on."""
        rows = slice(first, first + count)
        return replace(
            self,
            states={block: states[rows] for block, states in self.states.items()},
            mask=self.mask[rows],
            lead=self.lead[rows],
        )

    def indices(self, tokens: int, past: int, mask: Tensor | None) -> Tensor:
        """Return for each token of a pass the index of its source token, which may be out of range.

        Only tokens in the mask are counted, so masked cache entries do not shift the result.

        Args:
            tokens: Number of tokens in the pass.
            past: Number of tokens in earlier passes.
            mask: Which tokens count, including those of earlier passes; None for all.

        Shapes: `mask` [rows past + tokens]; returns [rows tokens].
        """
        every = past + torch.arange(tokens, device=self.lead.device)
        if mask is None or self.counts_padding or mask.shape[1] < tokens:
            return every[None] - self.lead[:, None]
        counts = mask.bool()
        numbers = counts.long().cumsum(-1) - 1 - self.lead[:, None]
        return torch.where(counts, numbers, _NOWHERE)[:, -tokens:]


_NOWHERE = -(2**40)
"""Source index for padding of a target."""


def _first(mask: Tensor) -> Tensor:
    return mask.long().argmax(-1)


def _last(mask: Tensor) -> Tensor:
    return mask.shape[-1] - 1 - mask.flip(-1).long().argmax(-1)


LAST = "last"
"""The alignment of the last source token with the whole prompt, which the release uses for generation."""

ALIGNMENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "position": lambda source, _lengths: -_first(source),
    "end": lambda source, lengths: lengths - 1 - _last(source),
    "row-end": lambda source, lengths: lengths - 1 - _last(source),
    "index": lambda source, _lengths: torch.zeros(len(source), dtype=torch.long, device=source.device),
}
"""Offset of a source in its target: first tokens, last tokens (of the prompt, or of the whole row if its
lengths are passed), or index by index including padding."""


def block_of(path: str) -> str:
    """Return the path of the block that contains a module.

    Raises:
        ValueError: it is not in a block.

    Example:
        >>> block_of("model.layers.3.self_attn.q_proj")
        'model.layers.3'
    """
    match = _BLOCK.match(path)
    if match is None:
        raise InvalidValueError(
            f"a fused module must be in a numbered block, and {path!r} is not", code="fusion.no-block"
        )
    return match[1]


def fused_modules(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the modules of a model that can fuse, by path: queries and values that read a block's states.

    Other modules have inputs that a source does not have; they are plain LoRAs, as in the release.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "fusion_sources") and path.rpartition(".")[2] in FUSING
    }


@torch.no_grad()
def read_sources(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    norm: bool = True,
    offset: int = 0,
    dropout: bool = False,
    run: Callable[[], object] | None = None,
) -> Sources:
    """Run the model without its adapters on source texts, in evaluation mode, and record its blocks' states.

    Args:
        model: A model with fusion LoRAs.
        batch: The tokenizer's output.
        norm: Record the input of the fused modules, which is after the norm in front of them; else the residual stream,
            as in the release (equal in models without such a norm).
        offset: 0 for a block's input, as in the release; 1 for its output, as in the paper (with `norm` the input of
            the next block's modules, and for the last block its plain output).
        dropout: Do not change the model's mode, so that its dropout is active in training, as in the release.
        run: Runs the model, if not by `model(**batch)`.

    Raises:
        ValueError: no module of the model fuses, or the offset is invalid.

    Reference: FLARE, section 3.2; the release uses the state before block i for block i.
    """
    if offset not in (0, 1):
        raise InvalidValueError(f"the offset of sources must be 0 or 1, got {offset}", code="fusion.offset")
    modules = fused_modules(model)
    if not modules:
        raise InvalidValueError("no module of the model fuses", code="fusion.no-module")
    firsts: dict[str, LoraLayer] = {}
    readers = _readers(model)
    for path, module in modules.items():
        if module in readers:
            firsts.setdefault(block_of(path), module)
    named, paths = dict(model.named_modules()), {module: path for path, module in modules.items()}
    caught: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for block, first in firsts.items():
            where = first if norm else named[block]
            if offset:
                where = named.get(_in_next_block(paths[first])) if norm else None
            if where is None:
                handle = named[block].register_forward_hook(partial(_catch_output, caught, block))
            else:
                handle = where.register_forward_pre_hook(partial(_catch_input, caught, block), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_plain(model, evaluating=not dropout))
        (run or (lambda: model(**batch)))()
    mask = batch["attention_mask"].bool()
    return Sources(
        states={block: states.detach() for block, states in caught.items()},
        mask=mask,
        lead=-_first(mask),
    )


def _in_next_block(path: str) -> str:
    """Return the path of the same module in the next block.

    Example:
        >>> _in_next_block("model.layers.3.self_attn.q_proj")
        'model.layers.4.self_attn.q_proj'
    """
    head, _, number = block_of(path).rpartition(".")
    return f"{head}.{int(number) + 1}{path.removeprefix(block_of(path))}"


def _body(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that is called with the tokens, with or without a head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body: nn.Module = inner if has_decoder(inner) else inner.base_model
    return body


def _readers(model: PreTrainedModel) -> set[nn.Module]:
    """Return the modules that read a text; for an encoder-decoder those of its encoder."""
    if has_decoder(model):
        return set(model.get_encoder().modules())
    return set(model.modules())


def _catch_input(
    caught: dict[str, Tensor], block: str, _module: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]
) -> None:
    caught[block] = inputs[0] if inputs else named["hidden_states"]


def _catch_output(
    caught: dict[str, Tensor], block: str, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]
) -> None:
    caught[block] = output if isinstance(output, Tensor) else output[0]


@contextmanager
def _plain(model: nn.Module, *, evaluating: bool) -> Iterator[None]:
    """Disable a model's adapters, and optionally set evaluation mode, while the context is open."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    modes = [(module, module.training) for module in model.modules()]
    try:
        if evaluating:
            model.eval()
        for layer in enabled:
            layer._disable_adapters = True
        yield
    finally:
        for layer in enabled:
            layer._disable_adapters = False
        for module, training in modes:
            module.training = training


class Fuser:
    """Fuses the forward passes of a model with sources, which stay set until they are replaced.

    A pass of n rows uses the sources of the next n rows; after the last row it is the first one again. A single pass
    may therefore have all rows, as in generation, or several passes may share them. Activation checkpointing works for
    the last pass only.

    Attributes:
        count: Number of calls of modules that fused; 0 means that the sources had no effect.
        taken: Number of rows whose sources were used since the last complete round.
    """

    def __init__(self, model: nn.Module) -> None:
        """Install the hooks.

        Args:
            model: A model with fusion LoRAs.
        """
        self.count = self.taken = 0
        self._sources: Sources | None = None
        self._modules = fused_modules(model)
        self._handle = _body(model).register_forward_pre_hook(self._begin, with_kwargs=True)

    def use(self, sources: Sources | None) -> None:
        """Set the sources of the next passes, and of the recomputation in the backward pass; None disables fusion."""
        self._sources, self.taken = sources, 0
        for module in self._modules.values():
            module.fusion_sources = None

    def check(self) -> None:
        """Check that passes used all sources.

        Raises:
            ValueError: some were not used.
        """
        if self.taken and self._sources:
            raise InvalidValueError(
                f"passes must use the sources of all {len(self._sources.mask)} rows, and used those of {self.taken}",
                code="fusion.sources-unread",
            )

    def close(self) -> None:
        """Remove the hooks."""
        self.use(None)
        self._handle.remove()

    def _note(self) -> None:
        self.count += 1

    def _take(self, sources: Sources, inputs: Tensor | None) -> Sources:
        """Return the sources of the next rows, as many as the inputs of a pass have."""
        total = len(sources.mask)
        count = total if inputs is None else len(inputs)  # a decoder that continues from its cache reads no text
        if self.taken + count > total:
            raise InvalidValueError(
                f"there must be a source for each of {count} rows, and there are {total - self.taken} of {total} left",
                code="fusion.source-count",
            )
        first, self.taken = self.taken, (self.taken + count) % total
        return sources if count == total else sources.part(first, count)

    def _begin(self, inner: nn.Module, inputs: tuple[Tensor, ...], more: Mapping[str, object]) -> None:
        # Sources are read with adapters disabled, while those of the previous batch are still set: these are ignored.
        all_sources = None if any(module.disable_adapters for module in self._modules.values()) else self._sources
        if all_sources is None:
            return
        named = signature(inner.forward).bind_partial(*inputs, **more).arguments
        text = named.get("input_ids")
        sources = self._take(all_sources, named.get("inputs_embeds") if text is None else text)
        cache = named.get("past_key_values")
        mask = named.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        mask = mask if mask is not None and mask.dim() == 2 else None
        embedded = named.get("inputs_embeds")
        read = next((inputs for inputs in (text, embedded, mask) if inputs is not None), None)
        tokens = 0 if read is None else read.shape[1] - (past if read is mask else 0)
        indices = sources.indices(tokens, past, mask)
        for path, module in self._modules.items():
            states = sources.states.get(block_of(path))
            module.fusion_sources = None if states is None else (states, sources.mask, indices, self._note)


@contextmanager
def fused(model: nn.Module, sources: Sources | None) -> Iterator[Fuser]:
    """Fuse a model's passes with sources; a backward pass with activation checkpointing must be in the block as well.

    Args:
        model: A model with fusion LoRAs.
        sources: Sources of the batch; None for plain LoRAs.

    Raises:
        ValueError: passes did not use all sources.
    """
    fuser = Fuser(model)
    try:
        fuser.use(sources)
        yield fuser
        fuser.check()
    finally:
        fuser.close()
