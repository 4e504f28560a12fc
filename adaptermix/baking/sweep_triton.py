"""The sweep over a block of columns as one kernel for GPUs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # in that case `sweep` does not use this module
    triton = None

_ROWS = 16
_compiled: Any = triton.jit if triton else lambda function: function


# A kernel takes numbers and pointers only, so its arguments cannot be grouped in an object.
@_compiled  # type: ignore[untyped-decorator]
def _sweep(  # noqa: PLR0917  (kernels take positional arguments)
    weight: tl.tensor,
    gradient: tl.tensor,
    scales: tl.tensor,
    coupling: tl.tensor,
    values: tl.tensor,
    codes: tl.tensor,
    moves: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    levels: tl.tensor,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    offset = row[:, None] * columns + column[None, :]
    start = tl.load(weight + offset, mask=inside, other=0.0)
    scale = tl.load(scales + offset, mask=inside, other=1.0)
    pending = tl.load(gradient + offset, mask=inside, other=0.0)
    selected = tl.zeros((ROWS, COLUMNS), tl.int32)
    moved = tl.zeros((ROWS, COLUMNS), tl.float32)
    for current in range(columns):
        here = column[None, :] == current
        before = tl.sum(tl.where(here, start, 0.0), 1)
        unit = tl.sum(tl.where(here, scale, 0.0), 1)
        diagonal = tl.load(coupling + current * columns + current)
        center = (before - tl.sum(tl.where(here, pending, 0.0), 1) / diagonal) / unit
        code = tl.zeros((ROWS,), tl.int32)
        for level in range(levels - 1):
            middle = (tl.load(values + level) + tl.load(values + level + 1)) / 2
            code += (center > middle).to(tl.int32)
        move = tl.load(values + code) * unit - before
        behind = (column > current) & (column < columns)
        factor = tl.load(coupling + current * columns + column, mask=behind, other=0.0)
        pending += move[:, None] * factor[None, :]
        selected = tl.where(here, code[:, None], selected)
        moved = tl.where(here, move[:, None], moved)
    tl.store(codes + offset, selected, mask=inside)
    tl.store(moves + offset, moved, mask=inside)


def sweep_block(
    weight: Tensor, gradient: Tensor, scales: Tensor, coupling: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Sweep a block of columns; as `sweep.sweep_block`."""
    rows, columns = weight.shape
    codes, moves = torch.empty_like(weight, dtype=torch.int32), torch.empty_like(weight)
    # Kernels start on the current device.
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        _sweep[(triton.cdiv(rows, _ROWS),)](
            weight,
            gradient,
            scales,
            coupling,
            values,
            codes,
            moves,
            rows,
            columns,
            len(values),
            ROWS=_ROWS,
            COLUMNS=triton.next_power_of_2(columns),
        )
    return codes, moves
