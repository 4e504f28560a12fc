"""Heads of this package: a linear layer without bias on hidden states, for every architecture.

transformers has no head for some families (tags on Gemma 3, answers in a text on Llama), and its heads read the last
block only. A model with such a head has the module paths of its class in transformers, so adapters fit both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .blocks import blocks, first_blocks
from .head_forms import Head, Reader
from .pooling import masked_mean, pool

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm")
"""Names of the final norm of a model that normalises before each block."""


class Gate(nn.Module):
    """Weights between 0 and 1 for each dimension of each token: sigmoid(local + global).

    Each branch is a bottleneck, d to d / ratio to d, with a layer norm and ReLU inside. The local branch reads a token,
    the global one the mean over the tokens of the text, without padding.

    Args:
        width: d.
        ratio: Width of the states divided by the width inside.
        branches: "both", "local" or "global".

    Reference: Dai et al., WACV 2021, arXiv 2009.14082, section 3.2 (there with batch norm, which padding would change).
    """

    def __init__(self, width: int, ratio: int, branches: str) -> None:
        super().__init__()
        inside = max(1, width // ratio)

        def branch() -> nn.Sequential:
            up, down = nn.Linear(width, inside, bias=False), nn.Linear(inside, width, bias=False)
            return nn.Sequential(up, nn.LayerNorm(inside), nn.ReLU(), down)

        self.local_branch = branch() if branches != "global" else None
        self.global_branch = branch() if branches != "local" else None

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the weights.

        Shapes: states [rows tokens d], mask [rows tokens]; returns [rows tokens d].
        """
        total = torch.zeros_like(states)
        if self.local_branch is not None:
            total = total + self.local_branch(states)
        if self.global_branch is not None:
            total = total + self.global_branch(masked_mean(states, mask).to(states).unsqueeze(1))
        return torch.sigmoid(total)


class FusedStates(nn.Module):
    """One state per token from the states of one or more blocks.

    Args:
        reader: The head's settings.
        width: d, the width of the states.
        count: Number of states that are read.
    """

    def __init__(self, reader: Reader, width: int, count: int) -> None:
        super().__init__()
        self._reader, self._width = reader, width
        fuses = count > 1 and not reader.mixes
        self.gate = Gate(width, reader.gate_ratio, reader.gate) if fuses and reader.aggregate in GATED else None
        self.mix = nn.Parameter(torch.zeros(count)) if reader.mixes else None
        self.out_width = 2 * width if fuses and reader.aggregate == "concat" else width

    def forward(self, states: list[Tensor], mask: Tensor) -> Tensor:
        """Return the fused states.

        Args:
            states: States of the blocks, the last block first, each [rows tokens d].
            mask: 1 for tokens, 0 for padding, [rows tokens].

        Shapes: returns [rows tokens out_width].
        """
        if len(states) == 1:
            return states[0]
        if self._reader.norm == "own":
            states = [nn.functional.layer_norm(each, (self._width,)) for each in states]
        if self.mix is not None:
            return torch.einsum("l,lrtd->rtd", self.mix.softmax(0), torch.stack(states))
        last, lower = states
        return self._fused(last, lower, mask)

    def _fused(self, last: Tensor, lower: Tensor, mask: Tensor) -> Tensor:
        total = last + lower
        if self.gate is None:
            mean_or_sum = total / 2 if self._reader.aggregate == "mean" else total
            return torch.cat([last, lower], -1) if self._reader.aggregate == "concat" else mean_or_sum
        weights: Tensor = self.gate(total, mask)
        return weights * total if self._reader.aggregate == "se" else weights * last + (1 - weights) * lower


GATED = ("aff", "se")
"""Aggregates that have a gate."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Outputs of a model with a head of this package; `start_logits` and `end_logits` are those of a span head.

    Args:
        logits: [rows labels] for a head on texts, else [rows tokens outputs].
    """

    logits: Tensor

    @property
    def start_logits(self) -> Tensor:
        """Logits of the first token of an answer."""
        return self.logits[..., 0]

    @property
    def end_logits(self) -> Tensor:
        """Logits of the last token of an answer."""
        return self.logits[..., 1]


class ModelWithHead(nn.Module):
    """A model without a head, with a head of this package on its hidden states.

    Args:
        body: The model without a head.
        head: The head, with its reader.
        kind: Kind of the base model, "encoder" or "causal".

    Attributes:
        config: Configuration of the body.
        reader: Fuses the states; it may have no parameters.
        head: The linear layer.

    Raises:
        ModelError: the model does not have the block that the head reads, or no final norm.
    """

    def __init__(self, body: PreTrainedModel, head: Head, *, kind: str) -> None:
        super().__init__()
        reader = head.reader or Reader()
        self.base_model_prefix: str = body.base_model_prefix or "model"
        self.config: PreTrainedConfig = body.config
        setattr(self, self.base_model_prefix, body)
        stack = blocks(body)[1]
        lower, count = reader.lower, len(stack)
        if lower is not None and (lower > count or (reader.stops_early and lower == 0)):
            first = 1 if reader.stops_early else 0
            raise ModelError(
                f"--head-layers must name a block from {first} to {count} of this base model, got {reader.layers}.",
                code="head.layers",
            )
        self._pools = head.form.name == "classes"
        self._pooling = {"auto": "last" if kind == "causal" else "first"}.get(reader.pooling, reader.pooling)
        self._extra: dict[str, bool] = {"use_cache": False} if kind == "causal" else {}
        self._cut = partial(first_blocks, body, lower) if reader.stops_early and lower else nullcontext
        below = range(count) if reader.mixes else [lower] if lower is not None and not reader.stops_early else []
        self._caught: dict[int, Tensor] = {}
        self._listening = False
        self._below = list(below)
        for number in set(self._below) - {count}:
            # The input of block K + 1 is the output of block K, also under activation checkpointing.
            stack[number].register_forward_pre_hook(partial(self._catch, number), with_kwargs=True)
        self._last = count
        self._norm = _final_norm(body) if reader.norm == "final" and self._below else None
        width = body.config.get_text_config().hidden_size
        self.reader = FusedStates(reader, width, 1 + len(self._below))
        self.head = nn.Linear(self.reader.out_width, head.outputs, bias=False)
        nn.init.normal_(self.head.weight, std=getattr(body.config.get_text_config(), "initializer_range", 0.02))

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without the head."""
        return cast("PreTrainedModel", getattr(self, self.base_model_prefix))

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return cast(torch.device, self.base_model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""
        return cast(torch.dtype, self.base_model.dtype)

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's embeddings, as transformers does."""
        return cast(nn.Module, self.base_model.get_input_embeddings())

    def gradient_checkpointing_enable(self, options: Mapping[str, bool]) -> None:
        """Recompute the activations of blocks in the backward pass; arguments as in transformers."""
        self.base_model.gradient_checkpointing_enable(dict(options))

    def _catch(self, number: int, _block: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        if self._listening:
            self._caught[number] = args[0] if args else kwargs["hidden_states"]

    @contextmanager
    def _catching(self) -> Iterator[None]:
        self._listening = True
        try:
            with self._cut():
                yield
        finally:
            self._listening = False
            self._caught.clear()

    def _states(self, attention_mask: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with self._catching():
            last = self.base_model(attention_mask=attention_mask, **inputs, **self._extra).last_hidden_state
            lower = [last if number == self._last else self._caught[number] for number in self._below]
        if self._norm:
            lower = [each if each is last else self._norm(each) for each in lower]
        return [last, *lower]

    def forward(self, *, attention_mask: Tensor, **inputs: Tensor) -> Outputs:
        """Return the head's outputs.

        Args:
            attention_mask: 1 for tokens, 0 for padding; [rows tokens].
            inputs: The other inputs of the model, such as `input_ids`.
        """
        return Outputs(self.head(self.vectors(attention_mask=attention_mask, **inputs)))

    def vectors(self, *, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return the inputs of the linear layer: one state per text for a head on texts, else one per token."""
        states: Tensor = self.reader(self._states(attention_mask, inputs), attention_mask)
        states = pool(states, attention_mask, self._pooling) if self._pools else states
        return states.to(self.head.weight.dtype)


def _final_norm(body: nn.Module) -> nn.Module:
    inner = getattr(body, "decoder", getattr(body, "encoder", body))
    for module in (body, inner):
        for name in _NORMS:
            if isinstance(norm := getattr(module, name, None), nn.Module):
                return norm
    raise ModelError(
        "--head-norm final needs a model that ends in a norm, and this base model does not; use --head-norm own.",
        code="head.final-norm",
    )


def add_own_head(body: PreTrainedModel, head: Head, *, kind: str, seed: int) -> tuple[ModelWithHead, tuple[str, ...]]:
    """Return a model with a new head of this package, and the names of the head's modules.

    Args:
        body: The model without a head.
        head: The head, with its reader.
        kind: As for `ModelWithHead`.
        seed: Seed of the head's weights.

    Raises:
        ModelError: the model does not have the block that the head reads.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ModelWithHead(body, head, kind=kind)
    model.reader.to(model.device, model.dtype)
    model.head.to(model.device, model.dtype)
    return model, ("head", *(["reader"] if any(True for _ in model.reader.parameters()) else []))
