"""Streaming safetensors writer: one tensor in memory at a time, and equal content gives equal bytes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from itertools import accumulate
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from ..errors import InvalidValueError
from .disk import WriteBehind

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
_CHUNK = 2**20
"""Bytes per write."""

Headers = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def file_order(headers: Headers) -> list[str]:
    """Return names in file order: wide dtypes first, so that each tensor is aligned, then by name.

    Args:
        headers: Dtype and shape per name.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}
    return sorted(headers, key=lambda name: (ranks[headers[name][0]], name))


def _check(headers: Headers) -> None:
    for name, (dtype, shape) in headers.items():
        if dtype not in DTYPE_NAMES:
            raise InvalidValueError(
                f"tensor {name!r} must be of a dtype that can be stored, got {dtype}", code="tensor-file.dtype"
            )
        if 0 in shape:
            raise InvalidValueError(
                f"tensor {name!r} must not be empty, got shape {list(shape)}", code="tensor-file.empty-tensor"
            )


def _header(headers: Headers, order: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in order:
        dtype, shape = headers[name]
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def file_size(headers: Headers, metadata: Mapping[str, str] | None = None) -> int:
    """Return the size in bytes of the file that `stream_tensors` writes for these headers."""
    content = sum(math.prod(shape) * dtype.itemsize for dtype, shape in headers.values())
    return len(_header(headers, file_order(headers), metadata or {})) + content


def _bytes(tensor: Tensor) -> memoryview:
    """View a tensor's content as bytes; only non-contiguous tensors are copied."""
    # Viewed as bytes, since NumPy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """A safetensors file being written; parts of tensors may come in any order and from any thread.

    Args:
        file: The file, unbuffered. The constructor writes its header.
        headers: Dtype and shape per name.
        metadata: Strings for the file's `__metadata__`.
        reached: Callback that receives the end offset after each write.
    """

    def __init__(
        self, file: FileIO, headers: Headers, metadata: Mapping[str, str], reached: Callable[[int], None]
    ) -> None:
        order = file_order(headers)
        header = _header(headers, order, metadata)
        sizes = [math.prod(headers[name][1]) * headers[name][0].itemsize for name in order]
        self._starts = dict(zip(order, accumulate(sizes[:-1], initial=len(header)), strict=True))
        self._file, self._lock, self._reached = file, Lock(), reached
        self._put(memoryview(header), 0)

    def write(self, name: str, part: Tensor, first: int = 0) -> None:
        """Write consecutive entries of a tensor.

        Args:
            name: The tensor.
            part: The entries, of the tensor's dtype.
            first: Flat index of the first entry.
        """
        data, start = _bytes(part), self._starts[name] + first * part.itemsize
        for offset in range(0, len(data), _CHUNK):
            self._put(data[offset : offset + _CHUNK], start + offset)

    def _put(self, data: memoryview, start: int) -> None:
        with self._lock:
            self._file.seek(start)
            rest = data
            while rest:  # The system may write less than requested.
                rest = rest[self._file.write(rest) :]
        self._reached(start + len(data))


@contextmanager
def tensor_file(path: Path, headers: Headers, metadata: Mapping[str, str] | None = None) -> Iterator[TensorFile]:
    """Open a safetensors file for writing; it is removed if the block raises.

    Args:
        path: The file.
        headers: Dtype and shape per name, for all tensors; the block must write each of them completely.
        metadata: Strings for the file's `__metadata__`.

    Raises:
        ValueError: a tensor is empty or of a dtype that cannot be stored.
    """
    if sys.byteorder != "little":
        raise InvalidValueError(
            "safetensors files are little-endian, and this machine is not", code="tensor-file.big-endian"
        )
    _check(headers)
    try:
        with path.open("wb", buffering=0) as file, WriteBehind(file.fileno()) as behind:
            yield TensorFile(file, headers, metadata or {}, behind.reached)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def stream_tensors(
    path: Path, headers: Headers, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whose headers are known before its tensors are computed.

    Args:
        path: The file.
        headers: Dtype and shape per name.
        tensors: Names and tensors, in the order of `file_order(headers)`. Each is released before the next is
            requested.
        metadata: Strings for the file's `__metadata__`.

    Raises:
        ValueError: a tensor is empty, cannot be stored, is missing or out of order, or differs from its header. The
            file is removed.
    """
    with tensor_file(path, headers, metadata) as file:
        rest = iter(file_order(headers))
        for name, tensor in tensors:
            expected = next(rest, None)
            if name != expected:
                raise InvalidValueError(
                    f"tensors must come in the order of the file: {expected!r} is next, got {name!r}",
                    code="tensor-file.order",
                )
            if (tensor.dtype, tuple(tensor.shape)) != (headers[name][0], tuple(headers[name][1])):
                raise InvalidValueError(
                    f"tensor {name!r} must be as announced, {headers[name]}, got {(tensor.dtype, *tensor.shape)}",
                    code="tensor-file.not-as-announced",
                )
            file.write(name, tensor)
            del tensor
        missing = next(rest, None)
        if missing is not None:
            raise InvalidValueError(
                f"every announced tensor must be passed, and {missing!r} is missing", code="tensor-file.missing"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, in an order that depends on names and dtypes only.

    Args:
        path: The file.
        tensors: Tensor per name; views and tensors that share memory are written in full.
        metadata: Strings for the file's `__metadata__`.

    Raises:
        ValueError: a tensor is empty or of a dtype that cannot be stored.
    """
    headers = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _check(headers)
    stream_tensors(path, headers, ((name, tensors[name]) for name in file_order(headers)), metadata)
