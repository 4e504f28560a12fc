r"""Choose codes column by column; each column compensates for the changes of the columns before it.

Babai's nearest-plane rounding and coordinate descent are the same loop. With weights w, a gradient g of each row, and a
coupling C: column c takes the code nearest to $w_c - g_c / C_{cc}$, moves by m, and adds $m\,C_{cj}$ to $g_j$ of every
column j after it. The contribution of a block of columns to those after it is one matrix product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, Integer
from torch import Tensor

_COLUMNS = 64


_Block = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function that sweeps a block, such as `sweep_block`."""


def sweep(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    scales: Float[Tensor, "out in"],
    coupling: Float[Tensor, "in in"],
    values: Float[Tensor, " levels"],
) -> Integer[Tensor, "out in"]:
    """Return the index of each weight's new value among the values.

    Args:
        weight: Initial weights.
        gradient: Contribution of the current weights, times the diagonal of the coupling.
        scales: Scale of each weight, positive.
        coupling: Its upper triangle has the effect of a column's move on the gradients of later columns.
        values: Values that weights have in units of their scales, in rising order.
    """
    block = _fused() if weight.is_cuda else sweep_block
    codes = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    gradient = gradient.clone()
    count = weight.shape[1]
    for first in range(0, count, _COLUMNS):
        part = slice(first, min(first + _COLUMNS, count))
        start, slope, each = (matrix[:, part].contiguous() for matrix in (weight, gradient, scales))
        codes[:, part], moves = block(start, slope, each, coupling[part, part].contiguous(), values)
        gradient[:, part.stop :].addmm_(moves, coupling[part, part.stop :])
    return codes.long()


@cache
def _fused() -> _Block:
    """Return the loop over a block as one kernel, if Triton and a C compiler are available."""
    if find_spec("triton") is None:
        return sweep_block
    from . import sweep_triton

    one = torch.ones(1, 1, device="cuda")
    try:
        sweep_triton.sweep_block(one, one.clone(), one, one, torch.arange(2.0, device="cuda"))
    except Exception as error:  # after any error the plain loop gives the same result
        warnings.warn(f"the search for codes is slow, since Triton cannot compile its kernel: {error}", stacklevel=2)
        return sweep_block
    return sweep_triton.sweep_block


def sweep_block(
    weight: Float[Tensor, "out columns"],
    gradient: Float[Tensor, "out columns"],
    scales: Float[Tensor, "out columns"],
    coupling: Float[Tensor, "columns columns"],
    values: Float[Tensor, " levels"],
) -> tuple[Integer[Tensor, "out columns"], Float[Tensor, "out columns"]]:
    """Sweep a block column by column; return indices among the values, and moves.

    Args:
        weight: Initial weights.
        gradient: As for `sweep`; it is overwritten.
        scales: Scale of each weight.
        coupling: The coupling of the block's columns.
        values: Values in rising order.
    """
    middles = (values[1:] + values[:-1]) / 2
    codes, moves = torch.empty_like(weight, dtype=torch.int32), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        start, scale = weight[:, column], scales[:, column]
        center = (start - gradient[:, column] / coupling[column, column]) / scale
        index = torch.bucketize(center, middles)
        move = torch.addcmul(-start, values[index], scale)
        codes[:, column] = index
        moves[:, column] = move
        gradient[:, column + 1 :].addr_(move, coupling[column, column + 1 :])
    return codes, moves
