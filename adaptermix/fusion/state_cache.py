"""Tensors that are kept: in memory up to a share of what is free, then on disk up to a share of that."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.memory import free_disk, free_memory

_SHARE_OF_MEMORY = 4
"""Tensors may take one part in so many of the memory that is free."""
_SPARED_OF_DISK = 5
"""Of the disk that is free one part in so many stays free."""


class Kept:
    """Tensors by number.

    What memory has no room for goes into a file in the system's folder for temporary ones (`TMPDIR`). It has no name
    where the system allows that, and ends with this object or with the process.
    """

    def __init__(self) -> None:
        self._left = free_memory(torch.device("cpu")) // _SHARE_OF_MEMORY
        self._held: dict[int, Tensor] = {}
        self._written: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0
        self._may_write = True

    def __contains__(self, number: int) -> bool:
        return number in self._held or number in self._written

    def __getitem__(self, number: int) -> Tensor:
        if number in self._held:
            return self._held[number]
        start, shape, dtype = self._written[number]
        found = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        left = _bytes(found)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError("the file of source states must hold what was written to it, and is shorter")
            left = left[count:]
        return found

    def add(self, number: int, tensor: Tensor) -> None:
        """Keep a tensor if there is room; it must not change from now on."""
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._held[number] = tensor.cpu()
        elif self._may_write:
            self._may_write = False  # a disk that others have filled, or that cannot be written to, is none
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
    def _file(self) -> Any:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (closed with this object)
        weakref.finalize(self, file.close)
        return file


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor, whatever its dtype."""
    return tensor.flatten().view(torch.uint8).numpy().data
