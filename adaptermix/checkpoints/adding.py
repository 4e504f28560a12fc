"""Base tensors with deltas added, in blocks that fit a processor's cache, computed and written by several threads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import local
from typing import Self

import torch
from torch import Tensor

from ..algebra import LowRank, all_finite
from ..errors import OutputError
from .reading import wide

_BLOCK = 2**18
_SAMPLE = 128
_MOST = 8
"""Largest number of threads: more of them would only wait for the file that all write into."""

_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The bits of infinity in 16 bits."""


class _Buffers(local):
    """Memory that a thread reuses for each block, since new pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def flat(self, role: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return an uninitialised vector."""
        buffer = self._buffers.get((role, dtype))
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[role, dtype] = torch.empty(max(count, _BLOCK), dtype=dtype)
        return buffer[:count]


class Crew:
    """A pool of as many threads as torch uses, which share the blocks of one tensor at a time.

    Blocks are too small to split each operation over threads, and one thread can write while another computes.
    """

    def __init__(self) -> None:
        self._count = min(torch.get_num_threads(), _MOST)
        # torch stores the number of threads separately for each thread
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(1,))
        self._rest: deque[slice] = deque()
        self._futures: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._rest.clear()
        self._pool.shutdown()
        # new threads inherit the number that was set last, so restore it
        torch.set_num_threads(torch.get_num_threads())

    def start(self, work: Callable[[slice], None], parts: Iterable[slice]) -> None:
        """Start work on each part, after the previous work has finished.

        Args:
            work: Processes one part, in any thread.
            parts: Slices of the flat tensor, started in this order.
        """
        self.finish()
        self._rest = deque(parts)
        self._futures = [self._pool.submit(_work, work, self._rest) for _ in range(self._count)]

    def finish(self) -> None:
        """Wait until the current work is finished; raise the error of a thread, if there was one."""
        wait(self._futures)
        for future in self._futures:
            future.result()


@torch.no_grad()
def _work(work: Callable[[slice], None], rest: deque[slice]) -> None:
    try:
        while rest:
            try:
                part = rest.popleft()
            except IndexError:  # another thread was faster
                return
            work(part)
    except BaseException:
        rest.clear()  # the other threads stop too
        raise


_buffers = _Buffers()


def write_sum(
    crew: Crew,
    write: Callable[[Tensor, int], None],
    base: Tensor,
    delta: Tensor | LowRank | None,
    *,
    stored: torch.dtype,
    name: str,
) -> None:
    """Write base plus delta in the storage dtype: add in float32 or wider and round once, a block at a time.

    For a delta of factors this returns before the work is finished, so that the caller can prepare the next delta. For
    a full delta it waits.

    Args:
        crew: The threads.
        write: Receives entries of the sum and the flat index of the first one.
        base: The tensor of the base model.
        delta: The delta to add; None copies the base.
        stored: The storage dtype.
        name: Name of the tensor, for the message.

    Shapes: base and delta have the same shape.

    Raises:
        OutputError: a sum overflows the storage dtype; raised here or by `crew.finish()`.
    """
    flat, width = base.reshape(-1), base.shape[-1] if isinstance(delta, LowRank) else 1
    # a product of factors is computed in whole rows
    step = max(1, _BLOCK // width) * width
    parts = [slice(first, min(first + step, len(flat))) for first in range(0, len(flat), step)]
    if delta is None and base.dtype == stored:
        crew.start(lambda part: write(flat[part], part.start), parts)
        return
    part_of = _parts(delta)
    factor = delta.b if isinstance(delta, LowRank) else delta
    dtype = wide(base) if factor is None else wide(base, factor)

    def work(part: slice) -> None:
        old, added = flat[part], part_of(part)
        new = _buffers.flat("sum", dtype, len(old)).copy_(old)
        if added is not None:
            new.add_(added)
        if dtype != stored:
            new = _buffers.flat("stored", stored, len(old)).copy_(new)
        _refuse_overflow(new, old, name)
        write(new, part.start)

    crew.start(work, parts)
    if isinstance(delta, Tensor):
        crew.finish()


def _refuse_overflow(new: Tensor, old: Tensor, name: str) -> None:
    if not _is_finite(new.reshape(-1)) and all_finite(old):
        raise OutputError(
            f"'{name}' must be finite in {str(new.dtype).removeprefix('torch.')}, and overflows it. "
            "Choose a wider dtype or smaller weights.",
            code="write.overflow",
        )


def rounding_share(base: Tensor, delta: Tensor, stored: torch.dtype, *, name: str) -> float:
    """Return the share of a delta's norm that rounding base plus delta to the storage dtype loses.

    Measured on the 128 rows with the largest delta, and estimated from 128 of the other rows with a delta and from 128
    of those without one: the delta of an embedding may change a few rows only.

    Args:
        base: The tensor of the base model.
        delta: The delta to add.
        stored: The storage dtype.
        name: Name of the tensor, for the message.

    Shapes: base and delta have the same shape.

    Raises:
        OutputError: a sum overflows the storage dtype.
    """
    dtype = wide(base, delta)
    if stored.itemsize >= dtype.itemsize:
        return 0.0
    before, added = (tensor.reshape(len(tensor) if tensor.ndim else 1, -1) for tensor in (base, delta))
    sizes = torch.linalg.vector_norm(added, dim=1, dtype=dtype).double()
    order, changed = sizes.argsort(descending=True, stable=True), int(sizes.count_nonzero())
    lost = 0.0
    for group in (order[:_SAMPLE], order[_SAMPLE:changed], order[max(_SAMPLE, changed) :]):
        if not len(group):
            continue
        rows = group[torch.linspace(0, len(group) - 1, min(len(group), _SAMPLE)).round().long()]
        old, some = before[rows].to(dtype), added[rows].to(dtype)
        new = (old + some).to(stored)
        _refuse_overflow(new, old, name)
        off = float(torch.linalg.vector_norm(new.to(dtype) - old - some, dtype=torch.float64))
        lost += len(group) / len(rows) * off**2
    length = float(torch.linalg.vector_norm(sizes))
    return math.sqrt(lost) / length if length > 0 else 0.0


def _is_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite. In 16 bits compare the bit patterns, since sums of halves are slow."""
    if values.dtype not in _INFINITY:
        return all_finite(values)
    sizes = _buffers.flat("sizes", torch.int16, len(values))
    torch.bitwise_and(values.view(torch.int16), 0x7FFF, out=sizes)  # without the sign
    return int(sizes.amax()) < _INFINITY[values.dtype]


def _parts(delta: Tensor | LowRank | None) -> Callable[[slice], Tensor | None]:
    """Return a function from a slice to the delta's entries there; with factors, a slice must cover whole rows."""
    if not isinstance(delta, LowRank):
        flat = None if delta is None else delta.reshape(-1).cpu()
        return lambda part: None if flat is None else flat[part]
    b, a = delta.b.cpu() * delta.scale, delta.a.cpu()
    width = a.shape[1]

    def product(part: slice) -> Tensor:
        out = _buffers.flat("product", a.dtype, part.stop - part.start)
        torch.mm(b[part.start // width : part.stop // width], a, out=out.view(-1, width))
        return out

    return product
