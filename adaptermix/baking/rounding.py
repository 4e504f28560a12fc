r"""Codes and scales in 4 bits that give a layer the outputs that an adapter wants.

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

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ..quantization import BLOCK
from .grid import FourBit, with_codes, with_scales

_DAMP = 1e-3
"""Share of the mean of H's diagonal that is added to it, as inputs that hardly occur must not decide anything."""
_RIDGE = 1e-4
"""The same for block scales, towards what they are."""
_COLUMNS = 128
_ROWS = 64
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
        moment = self.moment[self.order][:, self.order].double()
        damp = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        unit = damp * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        for share in (_DAMP, 10 * _DAMP, 100 * _DAMP, 1.0):
            root, failed = torch.linalg.cholesky_ex(moment + share * unit, upper=True)
            if not failed and torch.isfinite(root).all():
                narrowed: Tensor = root.to(self.moment.dtype)
                return narrowed
        raise ValueError("the second moment of the inputs must be finite and of no negative direction, and is not")

    def error(self, difference: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """Return the mean squared length of each row's outputs under a difference of weights."""
        return ((difference @ self.moment) * difference).sum(1)

    def product(self, one: Float[Tensor, "out in"], two: Float[Tensor, "out in"]) -> float:
        """Return the mean inner product of the outputs of two differences of weights."""
        return float(((one @ self.moment) * two).sum(dtype=torch.float64))


def nearest_plane(
    target: Float[Tensor, "out in"], scales: Float[Tensor, "out in"], table: Float[Tensor, " 16"], inputs: Inputs
) -> Integer[Tensor, "out in"]:
    """Round the columns one after another, each allowing for the errors of those before.

    Args:
        target: The weight that is wanted.
        scales: Scale of each weight.
        table: Values of the codes.
        inputs: What is known of the inputs.
    """
    order, root = inputs.order, inputs.root
    wanted, scales = target[:, order], scales[:, order]
    values, code_of = table.sort()  # that of FP4 is in no order
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.empty(target.shape, dtype=torch.long, device=target.device)
    pending = torch.zeros_like(wanted)  # what errors so far add, times the root's diagonal
    count = wanted.shape[1]
    for last in range(count, 0, -_COLUMNS):
        first = max(0, last - _COLUMNS)
        errors = torch.zeros_like(wanted[:, first:last])
        local = pending[:, first:last].clone()
        for column in range(last - 1, first - 1, -1):
            place = column - first
            scale = scales[:, column]
            center = wanted[:, column] - local[:, place] / root[column, column]
            codes[:, column] = torch.bucketize(center / scale, middles)
            errors[:, place] = values[codes[:, column]] * scale - wanted[:, column]
            local[:, :place] += errors[:, place, None] * root[first:column, column]
        pending[:, :first] += errors @ root[:first, first:last].T
    found = torch.empty_like(codes)
    found[:, order] = code_of[codes]
    return found


def descend(
    target: Float[Tensor, "out in"],
    codes: Integer[Tensor, "out in"],
    scales: Float[Tensor, "out in"],
    table: Float[Tensor, " 16"],
    inputs: Inputs,
) -> Integer[Tensor, "out in"]:
    """Move each weight once to the code that is best while the others stay, column by column.

    Args:
        target: The weight that is wanted.
        codes: Where to begin.
        scales: Scale of each weight.
        table: Values of the codes.
        inputs: What is known of the inputs.
    """
    moment = inputs.moment
    values, code_of = table.sort()
    codes = code_of.argsort()[codes]
    diagonal = moment.diagonal().clamp(min=torch.finfo(moment.dtype).tiny)
    middles = (values[1:] + values[:-1]) / 2
    gradient = (values[codes] * scales - target) @ moment
    count = target.shape[1]
    for first in range(0, count, _COLUMNS):
        last = min(first + _COLUMNS, count)
        local, moves = gradient[:, first:last].clone(), torch.zeros_like(target[:, first:last])
        for column in range(first, last):
            place, scale = column - first, scales[:, column]
            before = values[codes[:, column]] * scale
            best = torch.bucketize((before - local[:, place] / diagonal[column]) / scale, middles)
            moves[:, place] = values[best] * scale - before
            codes[:, column] = best
            local += moves[:, place, None] * moment[column, first:last]
        gradient += moves @ moment[first:last]
    return code_of[codes]


def fit_scales(target: Float[Tensor, "out in"], weight: FourBit, inputs: Inputs) -> Float[Tensor, " blocks"]:
    """Return the block scales that make the error of each row least while the codes stay.

    Args:
        target: The weight that is wanted; its rows are whole blocks.
        weight: Codes, and scales to stay near where the inputs say nothing.
        inputs: What is known of the inputs.
    """
    rows, count = target.shape
    blocks = count // BLOCK
    before = weight.scales.view(rows, blocks)
    values = weight.table[weight.codes.long()]
    found = torch.empty_like(before)
    block_of = torch.arange(count, device=target.device) // BLOCK
    for first in range(0, rows, _ROWS):
        part = slice(first, first + _ROWS)
        spread = torch.zeros(len(target[part]), blocks, count, dtype=target.dtype, device=target.device)
        spread.scatter_(1, block_of.expand(len(spread), 1, count), values[part].unsqueeze(1))
        weighted = spread @ inputs.moment
        system = weighted @ spread.transpose(1, 2)
        right = (weighted @ target[part].unsqueeze(2)).squeeze(2)
        ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(target.dtype).tiny)
        system = system + ridge[:, None, None] * torch.eye(blocks, dtype=target.dtype, device=target.device)
        found[part] = torch.linalg.solve(system, right + ridge[:, None] * before[part])
    # a block of the other sign would be other codes, and a scale of nothing none at all
    return torch.where(found > 0, found, before).flatten()


def fit(base: FourBit, target: Float[Tensor, "out in"], inputs: Inputs) -> FourBit:
    """Return codes and scales near a weight in 4 bits whose outputs are near those of a target.

    Each step is taken row by row where it lowers the error, so the error is never above that of the base itself.

    Args:
        base: Where to begin.
        target: The weight that is wanted.
        inputs: What is known of the inputs.
    """
    current, table = base, base.table
    error = inputs.error(base.weight() - target)
    # of each row; where blocks are parts of two rows scales stay
    blocks = 0 if target.shape[1] % BLOCK else target.shape[1] // BLOCK

    def take(found: FourBit) -> None:
        nonlocal current, error
        new = inputs.error(found.weight() - target)
        better = new < error
        codes = torch.where(better[:, None], found.codes, current.codes)
        codes = torch.where(table[codes.long()] == table[base.codes.long()], base.codes, codes)  # FP4 has two zeros
        if blocks:
            each = better.repeat_interleave(blocks)
            current = with_scales(with_codes(current, codes), torch.where(each, found.scales, current.scales))
        else:
            current = with_codes(current, codes)
        error = torch.where(better, new, error)

    for _ in range(_ROUNDS):
        if blocks:
            take(with_scales(current, fit_scales(target, current, inputs)))
        scales = current.scale_of_each()
        take(with_codes(current, nearest_plane(target, scales, table, inputs)))
        take(with_codes(current, descend(target, current.codes.long(), scales, table, inputs)))
    if blocks:
        take(with_scales(current, fit_scales(target, current, inputs)))
    return current
