r"""Functions that fuse the down-projections of a target and of its source.

With $a_t = A x_t$ and $a_s = A x_s$ a fusion LoRA gives $W x_t + s B \phi(a_s, a_t)$.

Reference: FLARE, section 3.2 (equations 2 and 3) and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..io.registry import Registry
from ..options import registries


@dataclass(frozen=True, kw_only=True, eq=False)
class Bottleneck:
    """Down-projections of a batch.

    Args:
        target: The target's tokens.
        source: The source's tokens.
        visible: Mask of the source tokens that a target token may attend to.
        aligned: The source token aligned with each target token; any values if there is no such token.
        present: Whether there is such a token.
    """

    target: Float[Tensor, "rows tokens rank"]
    source: Float[Tensor, "rows others rank"]
    visible: Bool[Tensor, "rows tokens others"]
    aligned: Float[Tensor, "rows tokens rank"]
    present: Bool[Tensor, "rows tokens"]

    def where_present(self, fused: Tensor) -> Tensor:
        """Return the fused values, and the target alone where there is no source."""
        return torch.where(self.present[..., None], fused, self.target)


class Elementwise(nn.Module):
    """An elementwise function of source and target.

    Args:
        function: Function of source and target.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, bottleneck: Bottleneck) -> Tensor:
        """Fuse token by token."""
        return bottleneck.where_present(self._function(bottleneck.aligned, bottleneck.target))


class Gated(nn.Module):
    """The target plus a learned multiple of the source; the multiple starts at 1, which equals `add`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, bottleneck: Bottleneck) -> Tensor:
        """Fuse token by token."""
        return bottleneck.where_present(bottleneck.target + self.gate * bottleneck.aligned)


class CrossAttention(nn.Module):
    """The target plus the result of single-head attention to the source.

    Args:
        rank: Width of the bottleneck.
        reversed_: Use the source as query and the target as keys, without adding the target, as in equation 3 of the
            paper. The shorter side is padded with zeros, which get attention too, and tokens of a decoder attend
            to later ones.
    """

    def __init__(self, rank: int, *, reversed_: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(rank, rank) for _ in range(3))
        self._reversed = reversed_

    def forward(self, bottleneck: Bottleneck) -> Tensor:
        """Return the fused down-projections."""
        if self._reversed:
            longest = max(bottleneck.source.shape[1], bottleneck.target.shape[1])
            source, target = (_lengthened(side, longest) for side in (bottleneck.source, bottleneck.target))
            attended = _attend(self.query(source), self.key(target), self.value(target), None)
            there = bottleneck.visible.any(-1, keepdim=True)  # a source may be missing
            return torch.where(there, attended[:, : bottleneck.target.shape[1]], bottleneck.target)
        attended = _attend(
            self.query(bottleneck.target),
            self.key(bottleneck.source),
            self.value(bottleneck.source),
            bottleneck.visible,
        )
        return bottleneck.target + torch.where(bottleneck.visible.any(-1, keepdim=True), attended, 0)


class SoftAlignment(nn.Module):
    """Finds the source of each target token by attention, for tokenwise fusions.

    Args:
        rank: Width of the bottleneck.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(rank, rank, bias=False), nn.Linear(rank, rank, bias=False)

    def forward(self, bottleneck: Bottleneck) -> Bottleneck:
        """Return the same bottleneck with the attended sources."""
        attended = _attend(
            self.query(bottleneck.target), self.key(bottleneck.source), bottleneck.source, bottleneck.visible
        )
        return Bottleneck(
            target=bottleneck.target,
            source=bottleneck.source,
            visible=bottleneck.visible,
            aligned=attended,
            present=bottleneck.visible.any(-1),
        )


def _lengthened(side: Tensor, length: int) -> Tensor:
    return nn.functional.pad(side, (0, 0, 0, length - side.shape[1]))


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    weights = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if visible is not None:
        weights = weights.masked_fill(~visible, torch.finfo(weights.dtype).min)
    attended: Tensor = weights.softmax(-1) @ value
    return attended


_BUILT_IN: Mapping[str, Callable[[int], nn.Module]] = {
    "add": lambda _: Elementwise(torch.add),
    "mul": lambda _: Elementwise(torch.mul),
    "add-relu": lambda _: Elementwise(lambda source, target: source.relu() + target.relu()),
    "mul-relu": lambda _: Elementwise(lambda source, target: source.relu() * target.relu()),
    "gated": lambda _: Gated(),
    "cross-attention": CrossAttention,
    "cross-attention-paper": lambda rank: CrossAttention(rank, reversed_=True),
}
FUSIONS: Registry[Callable[[int], nn.Module]] = registries.FUSIONS
"""Constructors of the fusion of a bottleneck of a given width. Other packages add to them by `adaptermix.fusions`."""
FUSIONS.update(_BUILT_IN)
