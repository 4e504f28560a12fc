r"""Codes and scales that reproduce an adapter's outputs.

A delta much smaller than the step between codes vanishes when each weight is rounded to the nearest code. Only the
outputs matter: with the second moment $H$ of the inputs the error of a row is $e H e^\top$, and errors of single
weights can cancel each other on the inputs that occur. Starting with the codes of the base, weights are rounded one
after another, each compensating for the errors of those before it (Babai's nearest plane, which is GPTQ). Then they are
changed one at a time while the error falls. Finally block scales, which have hundreds of values where a weight has 16,
are fitted to the remaining error by least squares.

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

from ..errors import InvalidValueError
from ..models.formats import Quantized
from .sweep import sweep

_DAMP = 1e-3
"""Share of the mean of H's diagonal that is added to it, so that rare inputs do not determine the result."""
_RIDGE = 1e-4
"""The same for block scales, towards their current values."""
Form = TypeVar("Form", bound=Quantized)
_NUMBERS = 2**22
"""Largest number of elements in memory at a time, for one product or for the linear systems of some rows."""
_ROUNDS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    r"""Statistics of a layer's inputs.

    Args:
        moment: Mean of $x x^\top$ over the rows, without the outer product of the mean if a bias compensates for it.

    Shapes: `moment` [in in].
    """

    moment: Float[Tensor, "in in"]

    @cached_property
    def order(self) -> Integer[Tensor, " in"]:
        """Return the columns, rarest inputs first; the last one is rounded first."""
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
        raise InvalidValueError(
            "the second moment of the inputs must be finite and positive semidefinite, and is not",
            code="bake.second-moment",
        )

    @cached_property
    def coupling(self) -> Float[Tensor, "in in"]:
        """Return the moment with a diagonal that is safe to divide by."""
        moment = self.moment.clone()
        moment.diagonal().clamp_(min=torch.finfo(moment.dtype).tiny)
        return moment


def nearest_plane(
    target: Float[Tensor, "out in"],
    scales: Float[Tensor, "out in"],
    table: Float[Tensor, " levels"],
    inputs: Inputs,
) -> Integer[Tensor, "out in"]:
    """Round the columns one after another, each compensating for the errors of those before it.

    Args:
        target: The desired weight.
        scales: Scale of each weight.
        table: Values of the codes.
        inputs: Statistics of the inputs.
    """
    order = inputs.order.flip(0)  # the most frequent inputs are rounded first
    values, code_of = table.sort()  # FP4's table is not sorted
    ordered = target[:, order]
    indices = sweep(ordered, torch.zeros_like(ordered), scales[:, order], inputs.root.flip(0, 1).T.contiguous(), values)
    result = torch.empty_like(indices)
    result[:, order] = code_of[indices]
    return result


def descend(
    target: Float[Tensor, "out in"],
    codes: Integer[Tensor, "out in"],
    scales: Float[Tensor, "out in"],
    table: Float[Tensor, " levels"],
    inputs: Inputs,
    *,
    gradient: Float[Tensor, "out in"] | None = None,
) -> Integer[Tensor, "out in"]:
    """Set each weight once to the code that is best while the others stay, column by column.

    Args:
        target: The desired weight.
        codes: Initial codes.
        scales: Scale of each weight.
        table: Values of the codes.
        inputs: Statistics of the inputs.
        gradient: The difference of weight and target times the moment, if already computed.
    """
    values, code_of = table.sort()
    weight = table[codes] * scales
    gradient = (weight - target) @ inputs.moment if gradient is None else gradient
    return code_of[sweep(weight, gradient, scales, inputs.coupling, values)]


def fit_scales(target: Float[Tensor, "out in"], weight: Quantized, inputs: Inputs) -> Float[Tensor, " blocks"]:
    """Return the block scales that minimise the error of each row for fixed codes.

    Args:
        target: The desired weight; its rows are whole blocks.
        weight: Codes, and scales to stay close to where the inputs are uninformative.
        inputs: Statistics of the inputs.
    """
    rows, count = target.shape
    blocks = count // weight.block
    before = weight.scales.view(rows, blocks)
    values = weight.table[weight.codes.long()]
    fitted = torch.empty_like(before)
    step = max(1, _NUMBERS // max(count, blocks * blocks))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        some = values[part]
        system, right = (torch.empty(len(some), blocks, *more, device=target.device) for more in ((blocks,), ()))
        for block in range(blocks):  # each block has values in its columns only
            columns = slice(block * weight.block, (block + 1) * weight.block)
            weighted = some[:, columns] @ inputs.moment[columns]
            system[:, block] = (weighted * some).view(len(some), blocks, -1).sum(2)
            right[:, block] = (weighted * target[part]).sum(1)
        ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(target.dtype).tiny)
        system = system + ridge[:, None, None] * torch.eye(blocks, dtype=target.dtype, device=target.device)
        fitted[part] = torch.linalg.solve(system, right + ridge[:, None] * before[part])
    # A negative scale would change the codes, and a scale of zero would erase them.
    return torch.where(fitted > 0, fitted, before).flatten()


def fit(base: Form, target: Float[Tensor, "out in"], inputs: Inputs) -> Form:
    """Return codes and scales near a quantised weight whose outputs are close to those of a target.

    Each step is applied per row only where it lowers the error, so the error never exceeds that of the base.

    Args:
        base: The initial weight.
        target: The desired weight.
        inputs: Statistics of the inputs.
    """
    current, table = base, base.table
    off = base.weight() - target
    gradient = off @ inputs.moment
    error = (gradient * off).sum(1)
    # Per row. Scales stay if blocks span two rows.
    blocks = 0 if target.shape[1] % base.block else target.shape[1] // base.block

    def take(candidate: Form) -> None:
        nonlocal current, error, gradient
        off = candidate.weight() - target
        there = off @ inputs.moment
        new = (there * off).sum(1)
        better = new < error
        codes = torch.where(better[:, None], candidate.codes, current.codes)
        codes = torch.where(table[codes.long()] == table[base.codes.long()], base.codes, codes)  # FP4 has two zeros
        current = current.with_codes(codes)
        if blocks:
            each = better.repeat_interleave(blocks)
            current = current.with_scales(torch.where(each, candidate.scales, current.scales))
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
