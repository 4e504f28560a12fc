r"""Codes and scales that give a layer the outputs that an adapter wants.

A delta much smaller than the step between codes vanishes when each weight is rounded to the nearest. What counts are
outputs: with the second moment $H$ of the inputs the error of a row is $e H e^\top$, and errors of single weights can
cancel each other on the inputs that occur. From the codes of the base on, weights are rounded one after another, each
allowing for the errors of those before (Babai's nearest plane, which GPTQ is), then moved one at a time while the error
falls; block scales, which have hundreds of values where a weight has 16, take up by least squares what is left.

References: Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323; Chen et al., The Geometry of LLM Quantization, 2025,
arXiv 2507.18553 (GPTQ is Babai's algorithm).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ..checkpoints.formats import Quantized
from .sweep import sweep

_DAMP = 1e-3
"""Share of the mean of H's diagonal that is added to it, as inputs that hardly occur must not decide anything."""
_RIDGE = 1e-4
"""The same for block scales, towards what they are."""
Form = TypeVar("Form", bound=Quantized)
_NUMBERS = 2**22
"""Numbers of one product, or of the systems of some rows, that are in memory at a time."""
_ROUNDS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    r"""What is known of a layer's inputs.

    Args:
        moment: Mean of $x x^\top$ over the rows that occur, less that of the mean where a bias takes it up.

    Shapes: `moment` [in in].
    """

    moment: Float[Tensor, "in in"]

    @cached_property
    def order(self) -> Integer[Tensor, " in"]:
        """Return the columns, those that occur least first; the last is rounded first."""
        return torch.argsort(self.moment.diagonal())

    @cached_property
    def root(self) -> Float[Tensor, "in in"]:
        r"""Return the upper triangular $R$ with $R^\top R = H$, in the order of `order`."""
        return self._root(self.moment[self.order][:, self.order])

    @cached_property
    def unordered_root(self) -> Float[Tensor, "in in"]:
        r"""Return the lower triangular $S$ with $S S^\top = H$, in the order of the inputs."""
        return self._root(self.moment).T

    @staticmethod
    def _root(moment: Tensor) -> Tensor:
        moment = moment.double()
        damp = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        unit = damp * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        for share in (_DAMP, 10 * _DAMP, 100 * _DAMP, 1.0):
            root, failed = torch.linalg.cholesky_ex(moment + share * unit, upper=True)
            if not failed and torch.isfinite(root).all():
                narrowed: Tensor = root.to(torch.float32)
                return narrowed
        raise ValueError("the second moment of the inputs must be finite and of no negative direction, and is not")

    @cached_property
    def coupling(self) -> Float[Tensor, "in in"]:
        """Return the moment with a diagonal that can be divided by."""
        found = self.moment.clone()
        found.diagonal().clamp_(min=torch.finfo(found.dtype).tiny)
        return found


def nearest_plane(
    target: Float[Tensor, "out in"],
    scales: Float[Tensor, "out in"],
    table: Float[Tensor, " levels"],
    inputs: Inputs,
) -> Integer[Tensor, "out in"]:
    """Round the columns one after another, each allowing for the errors of those before.

    Args:
        target: The weight that is wanted.
        scales: Scale of each weight.
        table: Values of the codes.
        inputs: What is known of the inputs.
    """
    order = inputs.order.flip(0)  # the inputs that occur most are rounded first
    values, code_of = table.sort()  # that of FP4 is in no order
    wanted = target[:, order]
    places = sweep(wanted, torch.zeros_like(wanted), scales[:, order], inputs.root.flip(0, 1).T.contiguous(), values)
    found = torch.empty_like(places)
    found[:, order] = code_of[places]
    return found


def descend(
    target: Float[Tensor, "out in"],
    codes: Integer[Tensor, "out in"],
    scales: Float[Tensor, "out in"],
    table: Float[Tensor, " levels"],
    inputs: Inputs,
    *,
    gradient: Float[Tensor, "out in"] | None = None,
) -> Integer[Tensor, "out in"]:
    """Move each weight once to the code that is best while the others stay, column by column.

    Args:
        target: The weight that is wanted.
        codes: Where to begin.
        scales: Scale of each weight.
        table: Values of the codes.
        inputs: What is known of the inputs.
        gradient: The difference of weight and target times the moment, if it is known.
    """
    values, code_of = table.sort()
    weight = table[codes] * scales
    gradient = (weight - target) @ inputs.moment if gradient is None else gradient
    return code_of[sweep(weight, gradient, scales, inputs.coupling, values)]


def fit_scales(target: Float[Tensor, "out in"], weight: Quantized, inputs: Inputs) -> Float[Tensor, " blocks"]:
    """Return the block scales that make the error of each row least while the codes stay.

    Args:
        target: The weight that is wanted; its rows are whole blocks.
        weight: Codes, and scales to stay near where the inputs say nothing.
        inputs: What is known of the inputs.
    """
    rows, count = target.shape
    blocks = count // weight.block
    before = weight.scales.view(rows, blocks)
    values = weight.table[weight.codes.long()]
    found = torch.empty_like(before)
    step = max(1, _NUMBERS // max(count, blocks * blocks))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        some = values[part]
        system, right = (torch.empty(len(some), blocks, *more, device=target.device) for more in ((blocks,), ()))
        for block in range(blocks):  # each has values in its own columns only
            own = slice(block * weight.block, (block + 1) * weight.block)
            weighted = some[:, own] @ inputs.moment[own]
            system[:, block] = (weighted * some).view(len(some), blocks, -1).sum(2)
            right[:, block] = (weighted * target[part]).sum(1)
        ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(target.dtype).tiny)
        system = system + ridge[:, None, None] * torch.eye(blocks, dtype=target.dtype, device=target.device)
        found[part] = torch.linalg.solve(system, right + ridge[:, None] * before[part])
    # a block of the other sign would be other codes, and a scale of nothing none at all
    return torch.where(found > 0, found, before).flatten()


def fit(base: Form, target: Float[Tensor, "out in"], inputs: Inputs) -> Form:
    """Return codes and scales near a quantised weight whose outputs are near those of a target.

    Each step is taken row by row where it lowers the error, so the error is never above that of the base itself.

    Args:
        base: Where to begin.
        target: The weight that is wanted.
        inputs: What is known of the inputs.
    """
    current, table = base, base.table
    off = base.weight() - target
    gradient = off @ inputs.moment
    error = (gradient * off).sum(1)
    # of each row; where blocks are parts of two rows scales stay
    blocks = 0 if target.shape[1] % base.block else target.shape[1] // base.block

    def take(found: Form) -> None:
        nonlocal current, error, gradient
        off = found.weight() - target
        there = off @ inputs.moment
        new = (there * off).sum(1)
        better = new < error
        codes = torch.where(better[:, None], found.codes, current.codes)
        codes = torch.where(table[codes.long()] == table[base.codes.long()], base.codes, codes)  # FP4 has two zeros
        current = current.with_codes(codes)
        if blocks:
            each = better.repeat_interleave(blocks)
            current = current.with_scales(torch.where(each, found.scales, current.scales))
        error = torch.where(better, new, error)
        gradient = torch.where(better[:, None], there, gradient)

    for _ in range(_ROUNDS):
        if blocks:
            take(current.with_scales(fit_scales(target, current, inputs)))
        scales = current.scale_of_each()
        take(current.with_codes(nearest_plane(target, scales, table, inputs)))
        take(current.with_codes(descend(target, current.codes.long(), scales, table, inputs, gradient=gradient)))
    if blocks:
        take(current.with_scales(fit_scales(target, current, inputs)))
    return current
