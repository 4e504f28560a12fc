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
"""Threads beyond which the file that all write into is what they wait for."""

_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The bits of infinity in 16 bits."""


class _Buffers(local):
    """Memory that a thread uses again for each block: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def flat(self, role: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return a vector of what was there before."""
        held = self._held.get((role, dtype))
        if held is None or len(held) < count:
            held = self._held[role, dtype] = torch.empty(max(count, _BLOCK), dtype=dtype)
        return held[:count]


class Crew:
    """As many threads as torch uses, each of which computes alone; one tensor at a time is shared among them.

    Blocks are too small to be shared out in each operation, and while one thread writes another one computes.
    """

    def __init__(self) -> None:
        self._count = min(torch.get_num_threads(), _MOST)
        # torch keeps the number of threads per thread
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(1,))
        self._rest: deque[slice] = deque()
        self._futures: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._rest.clear()
        self._pool.shutdown()
        # and a new thread takes the number that was set last
        torch.set_num_threads(torch.get_num_threads())

    def begin(self, work: Callable[[slice], None], places: Iterable[slice]) -> None:
        """Have a piece of work done for each place, after what was begun before.

        Args:
            work: Does it, in any thread.
            places: The places; they are begun in this order.
        """
        self.finish()
        self._rest = deque(places)
        self._futures = [self._pool.submit(_work, work, self._rest) for _ in range(self._count)]

    def finish(self) -> None:
        """Wait until all is done that was begun, and raise the error that one thread met, if one did."""
        wait(self._futures)
        for future in self._futures:
            future.result()


@torch.no_grad()
def _work(work: Callable[[slice], None], rest: deque[slice]) -> None:
    try:
        while rest:
            try:
                place = rest.popleft()
            except IndexError:  # another thread was faster
                return
            work(place)
    except BaseException:
        rest.clear()  # nothing is left for the others either
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
    """Have base plus delta written in the storage dtype: added in float32 or wider, rounded once, a block at a time.

    Factors are small, so that the next ones can be made meanwhile; a full delta is done with where this returns.

    Args:
        crew: Who does it.
        write: Takes entries of the sum and the flat place of the first of them.
        base: The tensor of the base model.
        delta: What is added; None leaves it as it is.
        stored: The storage dtype.
        name: Name of the tensor, for the message.

    Shapes: base and delta alike.

    Raises:
        OutputError: a sum overflows the storage dtype; from `crew.finish()` where it is not known before.
    """
    flat, width = base.reshape(-1), base.shape[-1] if isinstance(delta, LowRank) else 1
    # factors give whole rows
    step = max(1, _BLOCK // width) * width
    places = [slice(first, min(first + step, len(flat))) for first in range(0, len(flat), step)]
    if delta is None and base.dtype == stored:
        crew.begin(lambda place: write(flat[place], place.start), places)
        return
    part_of = _parts(delta)
    factor = delta.b if isinstance(delta, LowRank) else delta
    dtype = wide(base) if factor is None else wide(base, factor)

    def work(place: slice) -> None:
        old, part = flat[place], part_of(place)
        new = _buffers.flat("sum", dtype, len(old)).copy_(old)
        if part is not None:
            new.add_(part)
        if dtype != stored:
            new = _buffers.flat("stored", stored, len(old)).copy_(new)
        _refuse_overflow(new, old, name)
        write(new, place.start)

    crew.begin(work, places)
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

    Measured on the 128 rows of the largest delta, and estimated from 128 of the other rows with a delta and from 128
    of those without one: a delta may be in a few rows only, as that of an embedding is.

    Args:
        base: The tensor of the base model.
        delta: What is added.
        stored: The storage dtype.
        name: Name of the tensor, for the message.

    Shapes: base and delta alike.

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
    """Whether no entry is NaN or infinite, which read as whole numbers are the largest: halves are slow to sum."""
    if values.dtype not in _INFINITY:
        return all_finite(values)
    sizes = _buffers.flat("sizes", torch.int16, len(values))
    torch.bitwise_and(values.view(torch.int16), 0x7FFF, out=sizes)  # without the sign
    return int(sizes.amax()) < _INFINITY[values.dtype]


def _parts(delta: Tensor | LowRank | None) -> Callable[[slice], Tensor | None]:
    """Return what gives the entries of a delta at a place, which lie in rows where it has factors."""
    if not isinstance(delta, LowRank):
        flat = None if delta is None else delta.reshape(-1).cpu()
        return lambda place: None if flat is None else flat[place]
    b, a = delta.b.cpu() * delta.scale, delta.a.cpu()
    width = a.shape[1]

    def product(place: slice) -> Tensor:
        found = _buffers.flat("product", a.dtype, place.stop - place.start)
        torch.mm(b[place.start // width : place.stop // width], a, out=found.view(-1, width))
        return found

    return product
