"""What a model makes of a source text, kept for the pass over the target."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

FUSING = frozenset(
    (
        *("query", "q_proj", "q", "q_lin", "query_proj"),
        *("value", "v_proj", "v", "v_lin", "value_proj"),
    )
)
"""Names of the linear layers that fuse, those of queries and values, as in the paper and in the release."""
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """States of source texts, and where they stand beside the target.

    Args:
        states: By the path of the block that they are for.
        mask: Which tokens count.
        lead: Place of the first place of the source, counted from the target's first token that is no padding;
            negative where the source begins before it.
        counts_padding: Whether it is counted from the first place instead.
    """

    states: Mapping[str, Float[Tensor, "rows others width"]]
    mask: Bool[Tensor, "rows others"]
    lead: Integer[Tensor, " rows"]
    counts_padding: bool = False

    def beside(self, alignment: str, prompts: Sequence[int]) -> Sources:
        """Return the same beside targets.

        Args:
            alignment: Name of an alignment.
            prompts: Tokens of each target's prompt; those of an answer behind it do not count.
        """
        lengths = torch.tensor(list(prompts), device=self.mask.device)
        if alignment == LAST:
            return self._last_beside_all(lengths)
        lead = ALIGNMENTS[alignment](self.mask, lengths)
        return replace(self, lead=lead, counts_padding=alignment == "index")

    def _last_beside_all(self, lengths: Tensor) -> Sources:
        longest = int(lengths.max())
        rows, ends = torch.arange(len(self.mask), device=self.mask.device), _last(self.mask)
        return Sources(
            states={path: states[rows, ends, None].expand(-1, longest, -1) for path, states in self.states.items()},
            mask=(torch.arange(longest, device=self.mask.device)[None] < lengths[:, None]) & self.mask.any(-1)[:, None],
            lead=torch.zeros_like(lengths),
        )

    def part(self, first: int, count: int) -> Sources:
        """Return those of `count` rows from `first` on."""
        rows = slice(first, first + count)
        return replace(
            self,
            states={block: states[rows] for block, states in self.states.items()},
            mask=self.mask[rows],
            lead=self.lead[rows],
        )

    def places(self, tokens: int, past: int, mask: Tensor | None) -> Tensor:
        """Return for each token of a pass which place of the source is beside it; there may be none of that number.

        Counted are the tokens that count, so that what a cache holds but a mask leaves out moves nothing.

        Args:
            tokens: How many tokens the pass reads.
            past: How many were read in passes before.
            mask: Which tokens count, those of passes before among them; None for all.

        Shapes: `mask` [rows past + tokens]; returns [rows tokens].
        """
        every = past + torch.arange(tokens, device=self.lead.device)
        if mask is None or self.counts_padding or mask.shape[1] < tokens:
            return every[None] - self.lead[:, None]
        counts = mask.bool()
        numbers = counts.long().cumsum(-1) - 1 - self.lead[:, None]
        return torch.where(counts, numbers, _NOWHERE)[:, -tokens:]


_NOWHERE = -(2**40)
"""Place of a source beside padding of a target."""


def _first(mask: Tensor) -> Tensor:
    return mask.long().argmax(-1)


def _last(mask: Tensor) -> Tensor:
    return mask.shape[-1] - 1 - mask.flip(-1).long().argmax(-1)


LAST = "last"
"""The alignment that puts the last source token beside all of the prompt, as the release does when it generates."""

ALIGNMENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "position": lambda source, _lengths: -_first(source),
    "end": lambda source, lengths: lengths - 1 - _last(source),
    "row-end": lambda source, lengths: lengths - 1 - _last(source),
    "index": lambda source, _lengths: torch.zeros(len(source), dtype=torch.long, device=source.device),
}
"""Where a source begins in its target: first tokens together, last tokens together (of the prompt, or of the whole row,
whose lengths are given then), or place by place, padding too."""


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
    """Return the modules of a model that can fuse, by path: those of attention that read a block's states.

    Others read something else than a source has; they are plain LoRAs, as in the release.
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
        dropout: Leave the model in the mode that it is in, so that in training its dropout acts, as in the release.
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
    """Return the path of the like module in the next block.

    Example:
        >>> _in_next_block("model.layers.3.self_attn.q_proj")
        'model.layers.4.self_attn.q_proj'
    """
    head, _, number = block_of(path).rpartition(".")
    return f"{head}.{int(number) + 1}{path.removeprefix(block_of(path))}"


def _body(model: Any) -> nn.Module:
    """Return the part of a model that is called with the tokens, whatever head is called or passed over."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body: nn.Module = inner if inner.config.is_encoder_decoder else inner.base_model
    return body


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
def _plain(model: nn.Module, *, evaluating: bool) -> Iterator[None]:
    """Let a model be without its adapters, and in evaluation mode if that is asked for."""
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
    """Lets a model's passes fuse with sources, which stay until others take their place.

    Each pass takes the sources of as many rows as it has, and after the last of them the first ones again: so one pass
    may have all rows, as passes of generation do, or several may share them. Activations may be computed anew of the
    last pass only.

    Attributes:
        count: In how many modules that happened: a model whose passes do not reach them learns nothing.
        taken: How many rows' sources passes have taken since all were.
    """

    def __init__(self, model: nn.Module) -> None:
        """Stand before a model's passes.

        Args:
            model: A model with fused LoRAs.
        """
        self.count = self.taken = 0
        self._sources: Sources | None = None
        self._modules = fused_modules(model)
        self._handle = _body(model).register_forward_pre_hook(self._begin, with_kwargs=True)

    def use(self, sources: Sources | None) -> None:
        """Take the sources of the next passes, and of a backward pass that computes activations anew; None for none."""
        self._sources, self.taken = sources, 0
        for module in self._modules.values():
            module.fusion_sources = None

    def check(self) -> None:
        """Look whether passes have had all sources.

        Raises:
            ValueError: some are left.
        """
        if self.taken and self._sources:
            raise ValueError(
                f"passes must take the sources of all {len(self._sources.mask)} rows, and took those of {self.taken}"
            )

    def close(self) -> None:
        """Leave the model alone."""
        self.use(None)
        self._handle.remove()

    def _note(self) -> None:
        self.count += 1

    def _take(self, sources: Sources, given: Tensor | None) -> Sources:
        """Return the sources of the next rows: as many as there are in what a pass is given."""
        total = len(sources.mask)
        count = total if given is None else len(given)  # a decoder that goes on reads no text
        if self.taken + count > total:
            raise ValueError(
                f"there must be a source for each of {count} rows, and there are {total - self.taken} of {total} left"
            )
        first, self.taken = self.taken, (self.taken + count) % total
        return sources if count == total else sources.part(first, count)

    def _begin(self, inner: nn.Module, given: tuple[Any, ...], more: Mapping[str, Any]) -> None:
        # the base alone reads sources, while those of the batch before are still here
        all_sources = None if any(module.disable_adapters for module in self._modules.values()) else self._sources
        if all_sources is None:
            return
        named = signature(inner.forward).bind_partial(*given, **more).arguments
        text = named.get("input_ids")
        sources = self._take(all_sources, named.get("inputs_embeds") if text is None else text)
        cache: Any = named.get("past_key_values")
        mask = named.get("attention_mask")
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        mask = mask if mask is not None and mask.dim() == 2 else None
        embedded = named.get("inputs_embeds")
        read = next((given for given in (text, embedded, mask) if given is not None), None)
        tokens = 0 if read is None else read.shape[1] - (past if read is mask else 0)
        places = sources.places(tokens, past, mask)
        for path, module in self._modules.items():
            states = sources.states.get(block_of(path))
            module.fusion_sources = None if states is None else (states, sources.mask, places, self._note)


@contextmanager
def fused(model: nn.Module, sources: Sources | None) -> Iterator[Fuser]:
    """Let a model's passes fuse with sources; a backward pass that computes activations anew belongs in the block too.

    Args:
        model: A model with fused LoRAs.
        sources: Of the batch; None for plain LoRAs.

    Raises:
        ValueError: passes had no rows for some of them.
    """
    fuser = Fuser(model)
    try:
        fuser.use(sources)
        yield fuser
        fuser.check()
    finally:
        fuser.close()
