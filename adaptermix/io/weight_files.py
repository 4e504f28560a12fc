"""Adapter weight files, opened by their headers: safetensors, and PEFT's old pickles if allowed."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterFormatError, as_line
from .safetensors_writer import DTYPE_NAMES

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 32 * 2**20
MAX_PICKLE_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor's header: its dtype as safetensors names it (F32, ...) and its shape."""

    dtype: str
    shape: tuple[int, ...]


class WeightsFile(Protocol):
    """A file of named tensors whose headers are known."""

    path: Path

    @property
    def headers(self) -> Mapping[str, StoredTensor]:
        """Dtype and shape per name, sorted by name."""

    def read(self, key: str) -> Tensor:
        """Read one tensor."""


def one_line(error: object, limit: int = 300) -> str:
    """Return another library's message on one line, cut to a maximum length."""
    return as_line(error, limit) or type(error).__name__


def _damaged(path: Path, error: object) -> AdapterFormatError:
    return AdapterFormatError(
        f"{path} must be a whole safetensors file: {one_line(error)}. Fetch or save it again.",
        code="adapter-file.damaged",
    )


class Safetensors:
    """A safetensors file.

    Args:
        path: The file.

    Raises:
        AdapterFormatError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._check_length()
        try:
            with safe_open(path, framework="pt") as file:
                self.headers: Mapping[str, StoredTensor] = {key: _header(file, key) for key in sorted(file.keys())}
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise _damaged(path, error) from error

    def _check_length(self) -> None:
        """Check the header's length before memory is allocated for it."""
        try:
            whole = self.path.stat().st_size
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
        except OSError as error:
            raise _damaged(self.path, error) from error
        if length > min(MAX_HEADER_BYTES, whole - 8):
            raise _damaged(self.path, f"a header of {length} bytes does not fit a file of {whole}")

    @cached_property
    def _file(self) -> Any:
        return safe_open(self.path, framework="pt")

    def read(self, key: str) -> Tensor:
        """Read one tensor.

        Raises:
            AdapterFormatError: the file was damaged since its header was read.
        """
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise _damaged(self.path, error) from error
        return tensor


def _header(file: Any, key: str) -> StoredTensor:
    piece = file.get_slice(key)
    return StoredTensor(dtype=piece.get_dtype(), shape=tuple(piece.get_shape()))


class Pickle:
    """PEFT's old `adapter_model.bin`, read with torch's tensor-only unpickler, which runs no code.

    Args:
        path: The file.

    Raises:
        AdapterFormatError: it is damaged, compressed, or contains anything but a mapping from names to plain tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_archive(path)
        try:
            content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except Exception as error:  # The unpickler raises many classes.
            raise AdapterFormatError(
                f"{path} must be a pickle that contains only tensors, and is damaged or contains other objects "
                f"({one_line(error, 120)}). If you trust it, save the adapter as {WEIGHTS}.",
                code="pickle.not-tensors",
            ) from error
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise AdapterFormatError(
                f"{path} must hold a mapping from names to tensors, found {type(content).__name__}.",
                code="pickle.not-mapping",
            )
        self._tensors = {key: self._plain(key, content[key]) for key in sorted(content)}
        self.headers: Mapping[str, StoredTensor] = {
            key: StoredTensor(dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape))
            for key, tensor in self._tensors.items()
        }

    def _plain(self, key: str, value: object) -> Tensor:
        """Check that a tensor fits into the file: strides of 0 could expand a few bytes to a huge tensor."""
        if (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.dtype in DTYPE_NAMES
            and value.device.type == "cpu"
            and math.prod(value.shape) * value.itemsize <= value.untyped_storage().nbytes() <= self.path.stat().st_size
        ):
            return value.detach()
        raise AdapterFormatError(
            f"{self.path}: {key[:200]!r} must be a plain tensor. Save the adapter as {WEIGHTS}.",
            code="pickle.not-plain",
        )

    def read(self, key: str) -> Tensor:
        """Return one tensor, backed by the file."""
        return self._tensors[key].contiguous()


class Renamed:
    """A view of a file that renames its tensors.

    Args:
        file: The file.
        names: Name in the file per new name. Tensors that are not in it cannot be read.
    """

    def __init__(self, file: WeightsFile, names: Mapping[str, str]) -> None:
        self.path = file.path
        self._file, self._names = file, dict(sorted(names.items()))
        self.headers: Mapping[str, StoredTensor] = {new: file.headers[old] for new, old in self._names.items()}

    def stored(self, key: str) -> str:
        """Return a tensor's name in the file."""
        return self._names[key]

    def read(self, key: str) -> Tensor:
        """Read one tensor by its new name."""
        return self._file.read(self._names[key])


def _check_archive(path: Path) -> None:
    """Refuse archives that could grow when read, and torch's format before 1.6, which is not an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise AdapterFormatError(
            f"{path} must be an undamaged archive of torch 1.6 or later: {one_line(error)}. Fetch it again, or save it "
            f"as {WEIGHTS}.",
            code="pickle.archive",
        ) from error
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
    if not stored or max(pickles, default=0) > MAX_PICKLE_BYTES:
        raise AdapterFormatError(
            f"{path} must hold its entries uncompressed, as torch writes them. Save the adapter as {WEIGHTS}.",
            code="pickle.compressed",
        )


def open_weights(folder: Path, *, allow_pickle: bool) -> WeightsFile:
    """Open the weights of an adapter folder.

    Args:
        folder: The folder.
        allow_pickle: Read `adapter_model.bin` if there is no safetensors file.

    Raises:
        AdapterFormatError: there are no weights, or they are damaged.
    """
    if (folder / WEIGHTS).is_file():
        return Safetensors(folder / WEIGHTS)
    if (folder / f"{WEIGHTS}.index.json").is_file():
        raise AdapterFormatError(
            f"{folder} has its weights in several files with an index, which peft does not load either. Join them into "
            f"one {WEIGHTS}.",
            code="adapter-file.index",
        )
    if (folder / "adapters.safetensors").is_file():
        raise AdapterFormatError(
            f"an adapter folder must contain {WEIGHTS}, and {folder} has adapters.safetensors, which is MLX's format. "
            "Convert it to a PEFT adapter.",
            code="adapter-file.mlx",
        )
    if not (folder / PICKLE).is_file():
        raise AdapterFormatError(
            f"an adapter folder must contain {WEIGHTS}, and {folder} does not.", code="adapter-file.no-weights"
        )
    if not allow_pickle:
        raise AdapterFormatError(
            f"an adapter folder must contain {WEIGHTS}, and {folder} does not. {PICKLE} is a pickle, which is read "
            "only with --allow-pickle; or save it as safetensors with peft.",
            code="adapter-file.pickle-only",
        )
    return Pickle(folder / PICKLE)
