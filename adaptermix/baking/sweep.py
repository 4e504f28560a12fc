r"""Codes chosen one column after another, each allowing for the moves of those before.

Rounding to the nearest plane and coordinate descent are one loop. With weights w, a gradient g of each row, and a
coupling C: column c takes the code nearest to $w_c - g_c / C_{cc}$, moves by m, and adds $m\,C_{cj}$ to $g_j$ of every
column j behind it. What a block of columns adds to those behind it is one product of matrices.
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
"""What sweeps a block: as `sweep_block`."""


def sweep(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    scales: Float[Tensor, "out in"],
    coupling: Float[Tensor, "in in"],
    values: Float[Tensor, " levels"],
) -> Integer[Tensor, "out in"]:
    """Return the place of each weight's new value among the values.

    Args:
        weight: Where each weight begins.
        gradient: What the weights so far add to it, times the diagonal of the coupling.
        scales: Scale of each weight, positive.
        coupling: In its upper triangle what a move of a column adds to the gradients of those behind it.
        values: Values that weights have in units of their scales, in rising order.
    """
    block = _fused() if weight.is_cuda else sweep_block
    codes = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    gradient = gradient.clone()
    count = weight.shape[1]
    for first in range(0, count, _COLUMNS):
        part = slice(first, min(first + _COLUMNS, count))
        start, own, each = (matrix[:, part].contiguous() for matrix in (weight, gradient, scales))
        codes[:, part], moves = block(start, own, each, coupling[part, part].contiguous(), values)
        gradient[:, part.stop :].addmm_(moves, coupling[part, part.stop :])
    return codes.long()


@cache
def _fused() -> _Block:
    """Return the loop over a block in one kernel, where there is Triton and a C compiler that it needs."""
    if find_spec("triton") is None:
        return sweep_block
    from . import sweep_triton

    one = torch.ones(1, 1, device="cuda")
    try:
        sweep_triton.sweep_block(one, one.clone(), one, one, torch.arange(2.0, device="cuda"))
    except Exception as error:  # whatever it is, the loop does the same
        warnings.warn(f"codes are searched slowly, as Triton makes no kernel here: {error}", stacklevel=2)
        return sweep_block
    return sweep_triton.sweep_block


def sweep_block(
    weight: Float[Tensor, "out columns"],
    gradient: Float[Tensor, "out columns"],
    scales: Float[Tensor, "out columns"],
    coupling: Float[Tensor, "columns columns"],
    values: Float[Tensor, " levels"],
) -> tuple[Integer[Tensor, "out columns"], Float[Tensor, "out columns"]]:
    """Sweep a block column by column; return places among the values, and moves.

    Args:
        weight: Where each weight begins.
        gradient: As for `sweep`; it is used up.
        scales: Scale of each weight.
        coupling: That of the block's columns.
        values: Values in rising order.
    """
    middles = (values[1:] + values[:-1]) / 2
    codes, moves = torch.empty_like(weight, dtype=torch.int32), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        start, scale = weight[:, column], scales[:, column]
        center = (start - gradient[:, column] / coupling[column, column]) / scale
        place = torch.bucketize(center, middles)
        move = torch.addcmul(-start, values[place], scale)
        codes[:, column] = place
        moves[:, column] = move
        gradient[:, column + 1 :].addr_(move, coupling[column, column + 1 :])
    return codes, moves
