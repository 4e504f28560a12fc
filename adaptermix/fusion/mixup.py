r"""Mixing of a target's states with its source's in one block, as in X-Mixup; a baseline of FLARE.

At the mixing block a target state $h_t$ becomes $\lambda h_t + (1 - \lambda) h_{t|s}$, where $h_{t|s}$ is the result of
its attention to the source's states at the same block. $\lambda = \lambda_0\,\sigma(w H + b)$ grows with the entropy
$H$ of that attention in both directions: the worse a translation fits, the less of it is used.

Reference: Yang et al., Enhancing Cross-lingual Transfer by Manifold Mixup, ICLR 2022, arXiv 2205.04182, section 3.
The paper uses the block's attention and trains all weights. Here a separate module, initialised as plain attention
between states, works for any architecture, and a LoRA trains the rest of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..models.base import BaseModel, backbone
from ..models.blocks import blocks

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

States = TypeVar("States", Tensor, tuple[Tensor, ...])

MIXUP = "x-mixup"
"""Its name among the fusions."""
_MOST = 0.5
"""Largest weight of the target's states, lambda_0 of the paper."""


class Mixup(nn.Module):
    """The trained module: single-head attention, and the effect of its entropy.

    Args:
        width: Width of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.entropy = nn.Linear(1, 1)
        with torch.no_grad():
            for projection in (self.query, self.key, self.value):
                projection.weight.copy_(torch.eye(width))
                projection.bias.zero_()
            self.entropy.weight.fill_(1)
            self.entropy.bias.zero_()

    def forward(
        self,
        target: Float[Tensor, "rows tokens width"],
        source: Float[Tensor, "rows others width"],
        reads: Bool[Tensor, "rows tokens"],
        mask: Bool[Tensor, "rows others"],
    ) -> Float[Tensor, "rows tokens width"]:
        """Mix.

        Args:
            target: States of the target.
            source: States of the source at the same block.
            reads: Which target tokens count.
            mask: Which source tokens count.
        """
        scores = self.query(target) @ self.key(source).transpose(-1, -2) / target.shape[-1] ** 0.5
        scores = scores.float()
        least = torch.finfo(scores.dtype).min
        looking = scores.masked_fill(~mask[:, None], least).softmax(-1)
        looked_at = scores.transpose(-1, -2).masked_fill(~reads[:, None], least).softmax(-1)
        both = _entropy(looking, reads) + _entropy(looked_at, mask)
        share = _MOST * self.entropy(both[:, None].to(target.dtype)).sigmoid()[..., None]
        mixed = share * target + (1 - share) * (looking.to(target.dtype) @ self.value(source))
        return torch.where(mask.any(-1)[:, None, None], mixed, target)  # a source may be missing


def _entropy(weights: Tensor, mask: Tensor) -> Tensor:
    """Return the mean entropy of attention over the tokens that count. [rows]."""
    least = torch.finfo(weights.dtype).tiny  # the derivative of the entropy is unbounded at 0
    each = -(weights * weights.clamp_min(least).log()).sum(-1)
    entropy: Tensor = (each * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return entropy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passed:
    """The results of a forward pass.

    Args:
        states: States of the mixing block.
        mask: Which tokens count.
        logits: Logits of the head.
        first: The last state of the first token, which the head reads.
    """

    states: Float[Tensor, "rows tokens width"]
    mask: Bool[Tensor, "rows tokens"]
    logits: Float[Tensor, "rows outputs"]
    first: Float[Tensor, "rows width"]


class Mixer:
    """Mixes a pass's states at the mixing block with a source, and records the pass.

    Args:
        base: A model with a head, and with a `Mixup`.
        layer: Number of the mixing block, 1 to n.
        module: Name of the `Mixup` in the model.
    """

    def __init__(self, base: BaseModel, layer: int, module: str) -> None:
        self._mixup = base.model.get_submodule(module)
        self._source: Passed | None = None
        self._recorded: dict[str, Tensor] = {}
        body, block = backbone(base), blocks(base.model)[1][layer - 1]
        self._handles = [
            body.register_forward_pre_hook(self._begin, with_kwargs=True),
            block.register_forward_hook(self._mix),
            body.register_forward_hook(self._end),
            base.model.register_forward_hook(self._answered),
        ]

    def use(self, source: Passed | None) -> None:
        """Set the source of the next pass; None for a pass without one."""
        self._source = source

    def passed(self) -> Passed:
        """Return the results of the last pass."""
        return Passed(**self._recorded)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, body: nn.Module, inputs: tuple[Tensor, ...], more: Mapping[str, object]) -> None:
        named = signature(body.forward).bind_partial(*inputs, **more).arguments
        self._recorded["mask"] = named["attention_mask"].bool()

    def _mix(self, _block: nn.Module, _inputs: object, output: States) -> States:
        states = output if isinstance(output, Tensor) else output[0]
        if self._source is not None:
            states = self._mixup(states, self._source.states, self._recorded["mask"], self._source.mask)
        self._recorded["states"] = states
        return states if isinstance(output, Tensor) else (states, *output[1:])

    def _end(self, _body: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        self._recorded["first"] = output[0][:, 0]

    def _answered(self, _model: nn.Module, _inputs: object, output: ModelOutput) -> None:
        self._recorded["logits"] = output.logits


def consistency(source: Passed, target: Passed) -> Tensor:
    """Return the difference of the two sides: KL divergence of the classes, plus squared distance of the first states.

    Reference: the release of X-Mixup; both are means, over rows and over rows and width.
    """
    kl = nn.functional.kl_div(
        target.logits.float().log_softmax(-1),
        source.logits.float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    return kl + nn.functional.mse_loss(target.first.float(), source.first.float())
