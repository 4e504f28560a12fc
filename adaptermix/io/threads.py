"""The number of threads for computing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set torch's thread count for the block. For small tensors, waking more threads costs more than they save.

    Args:
        count: The number of threads; None keeps the current one.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)
