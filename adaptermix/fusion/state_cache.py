"""A tensor cache: in memory up to a share of the free memory, then on disk up to a share of the free space."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from contextlib import suppress
from functools import cached_property
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ..io.memory import free_disk, free_memory

_SHARE_OF_MEMORY = 4
"""Cache at most 1/4 of the free memory."""
_SPARED_OF_DISK = 5
"""Leave at least 1/5 of the free disk space."""


class StateCache:
    """A cache of tensors by number.

    Tensors that do not fit in memory go to a file in the system's temporary folder (`TMPDIR`). The file is unnamed
    where the system supports that, and is removed with this object or with the process.
    """

    def __init__(self) -> None:
        self._left = free_memory(torch.device("cpu")) // _SHARE_OF_MEMORY
        self._in_memory: dict[int, Tensor] = {}
        self._written: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0
        self._may_write = True

    def __contains__(self, number: int) -> bool:
        return number in self._in_memory or number in self._written

    def __getitem__(self, number: int) -> Tensor:
        if number in self._in_memory:
            return self._in_memory[number]
        start, shape, dtype = self._written[number]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        left = _bytes(tensor)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError("the file of source states is truncated")
            left = left[count:]
        return tensor

    def add(self, number: int, tensor: Tensor) -> None:
        """Cache a tensor if there is room; it must not change afterwards."""
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._in_memory[number] = tensor.cpu()
        elif self._may_write:
            self._may_write = False  # stays False if the disk is full or not writable
            with suppress(OSError):
                self._may_write = self._write(number, tensor.cpu().contiguous())

    def _write(self, number: int, tensor: Tensor) -> bool:
        """Return whether there was room."""
        if shutil.disk_usage(tempfile.gettempdir()).free - tensor.nbytes < self._spared:
            return False
        self._file.seek(self._end)
        left = _bytes(tensor)
        while left:
            left = left[self._file.write(left) :]
        self._written[number] = (self._end, tensor.shape, tensor.dtype)
        self._end += tensor.nbytes
        return True

    @cached_property
    def _spared(self) -> float:
        """Bytes of the disk that stay free."""
        return free_disk(Path(tempfile.gettempdir())) / _SPARED_OF_DISK or math.inf

    @cached_property
    def _file(self) -> FileIO:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (closed with this object)
        weakref.finalize(self, file.close)
        return file


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor as bytes, for any dtype."""
    return tensor.flatten().view(torch.uint8).numpy().data
