"""Vectors of many rows, computed in batches of rows of similar length, so that little is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ROWS = 32


def vectors_by_length(
    compute: Callable[[list[int]], Tensor],
    lengths: Sequence[int],
    advance: Callable[[int, str], None] = lambda _count, _text: None,
) -> Tensor:
    """Return a vector per row, in float32 on the CPU, in the order of the rows.

    Args:
        compute: Returns the vectors of rows by their numbers, [rows width].
        lengths: Tokens of each row.
        advance: Receives the number of rows of each finished batch.

    Shapes: [all_rows width].
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    parts: list[Tensor] = []
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        parts.append(compute(rows).float().cpu())
        advance(len(rows), "")
    return torch.cat(parts)[torch.tensor(order).argsort()]
