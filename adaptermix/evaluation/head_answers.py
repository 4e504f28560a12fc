"""Answers of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..progress import SILENT, Watcher
from ..tasks.heads import HeadRows


@torch.inference_mode()
def answers_of_head(
    encoded: HeadRows,
    *,
    batch_size: int,
    indices: Sequence[int] | None = None,
    before: Callable[[Sequence[int]], None] = lambda _rows: None,
    watch: Watcher = SILENT,
    label: str = "answer",
) -> list[str]:
    """Return the answer to every row, or to some.

    Args:
        encoded: Rows, encoded for a model with a head.
        batch_size: Rows per batch; rows of similar length are run together.
        indices: Indices of the rows, in this order; default all.
        before: Called before each batch with its rows.
        watch: Receives progress.
        label: Name of the progress bar.
    """
    indices = range(len(encoded.lengths)) if indices is None else indices
    order = sorted(indices, key=lambda row: encoded.lengths[row])
    answers: dict[int, str] = {}
    with watch.track(label, len(order)) as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            before(rows)
            answers |= zip(rows, encoded.answers(rows), strict=True)
            advance(len(rows), "")
    return [answers[row] for row in indices]
