r"""How the down-projections of a target and of its source become one.

With $a_t = A x_t$ and $a_s = A x_s$ a fused LoRA gives $W x_t + s B \phi(a_s, a_t)$.

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
        target: Of the target's tokens.
        source: Of the source's tokens.
        visible: Which source tokens a target token may look at.
        aligned: The source token that stands beside each target token; anything where there is none.
        present: Whether there is one.
    """

    target: Float[Tensor, "rows tokens rank"]
    source: Float[Tensor, "rows others rank"]
    visible: Bool[Tensor, "rows tokens others"]
    aligned: Float[Tensor, "rows tokens rank"]
    present: Bool[Tensor, "rows tokens"]

    def where_present(self, fused: Tensor) -> Tensor:
        """Return what is fused, and the target alone where there is no source."""
        return torch.where(self.present[..., None], fused, self.target)


class Elementwise(nn.Module):
    """A function of two numbers.

    Args:
        function: Of source and target.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, given: Bottleneck) -> Tensor:
        """Fuse token by token."""
        return given.where_present(self._function(given.aligned, given.target))


class Gated(nn.Module):
    """The target and a learned multiple of the source; 1 at the start, where it is `add`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, given: Bottleneck) -> Tensor:
        """Fuse token by token."""
        return given.where_present(given.target + self.gate * given.aligned)


class CrossAttention(nn.Module):
    """The target and what it finds in the source by attention of one head.

    Args:
        rank: Width of the bottleneck.
        reversed_: Let the source ask the target, with nothing added, as equation 3 of the paper has it. The shorter
            side is padded with zeros, and padding takes part; a decoder sees tokens to come.
    """

    def __init__(self, rank: int, *, reversed_: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(rank, rank) for _ in range(3))
        self._reversed = reversed_

    def forward(self, given: Bottleneck) -> Tensor:
        """Attend."""
        if self._reversed:
            longest = max(given.source.shape[1], given.target.shape[1])
            source, target = (_lengthened(side, longest) for side in (given.source, given.target))
            found = _attend(self.query(source), self.key(target), self.value(target), None)
            there = given.visible.any(-1, keepdim=True)  # a source may be missing
            return torch.where(there, found[:, : given.target.shape[1]], given.target)
        found = _attend(self.query(given.target), self.key(given.source), self.value(given.source), given.visible)
        return given.target + torch.where(given.visible.any(-1, keepdim=True), found, 0)


class SoftAlignment(nn.Module):
    """Finds the source of each target token by attention, for a fusion of tokens.

    Args:
        rank: Width of the bottleneck.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(rank, rank, bias=False), nn.Linear(rank, rank, bias=False)

    def forward(self, given: Bottleneck) -> Bottleneck:
        """Return the same with sources that were found."""
        found = _attend(self.query(given.target), self.key(given.source), given.source, given.visible)
        return Bottleneck(
            target=given.target,
            source=given.source,
            visible=given.visible,
            aligned=found,
            present=given.visible.any(-1),
        )


def _lengthened(side: Tensor, length: int) -> Tensor:
    return nn.functional.pad(side, (0, 0, 0, length - side.shape[1]))


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    weights = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if visible is not None:
        weights = weights.masked_fill(~visible, torch.finfo(weights.dtype).min)
    found: Tensor = weights.softmax(-1) @ value
    return found


_OWN: Mapping[str, Callable[[int], nn.Module]] = {
    "add": lambda _: Elementwise(torch.add),
    "mul": lambda _: Elementwise(torch.mul),
    "add-relu": lambda _: Elementwise(lambda source, target: source.relu() + target.relu()),
    "mul-relu": lambda _: Elementwise(lambda source, target: source.relu() * target.relu()),
    "gated": lambda _: Gated(),
    "cross-attention": CrossAttention,
    "cross-attention-paper": lambda rank: CrossAttention(rank, reversed_=True),
}
FUSIONS: Registry[Callable[[int], nn.Module]] = registries.FUSIONS
"""Functions from the width of a bottleneck to its fusion. Entry points of other packages: `adaptermix.fusions`."""
FUSIONS.update(_OWN)
