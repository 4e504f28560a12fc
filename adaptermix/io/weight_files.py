"""Weight files of adapters, opened by their headers: safetensors, and PEFT's old pickles where they are allowed."""

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

from ..errors import AdapterFormatError, shown
from .safetensors_writer import DTYPE_NAMES

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 32 * 2**20
MAX_PICKLE_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """What a file says of one tensor before it is read: its dtype in safetensors' words (F32, ...) and its shape."""

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
    """Return a foreign message on one line, cut to a length."""
    return shown(error, limit) or type(error).__name__


def _damaged(path: Path, error: object) -> AdapterFormatError:
    return AdapterFormatError(f"{path} must be a whole safetensors file: {one_line(error)}. Fetch or save it again.")


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
        """Check the header's length before anything is allocated for it."""
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
    """PEFT's old `adapter_model.bin`, through torch's unpickler for tensors alone, which runs no code.

    Args:
        path: The file.

    Raises:
        AdapterFormatError: it is damaged, compressed, or holds anything but a mapping from names to plain tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_archive(path)
        try:
            content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except Exception as error:  # the unpickler's many kinds
            raise AdapterFormatError(
                f"{path} must be a pickle of tensors alone, and holds something else or is damaged "
                f"({one_line(error, 120)}). Save the adapter as {WEIGHTS} where you trust it."
            ) from error
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise AdapterFormatError(
                f"{path} must hold a mapping from names to tensors, found {type(content).__name__}."
            )
        self._tensors = {key: self._plain(key, content[key]) for key in sorted(content)}
        self.headers: Mapping[str, StoredTensor] = {
            key: StoredTensor(dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape))
            for key, tensor in self._tensors.items()
        }

    def _plain(self, key: str, value: object) -> Tensor:
        """Check that a tensor is what the file has room for: strides of 0 make a huge one of a few bytes."""
        if (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.dtype in DTYPE_NAMES
            and value.device.type == "cpu"
            and math.prod(value.shape) * value.itemsize <= value.untyped_storage().nbytes() <= self.path.stat().st_size
        ):
            return value.detach()
        raise AdapterFormatError(f"{self.path}: {key[:200]!r} must be a plain tensor. Save the adapter as {WEIGHTS}.")

    def read(self, key: str) -> Tensor:
        """Return one tensor, backed by the file."""
        return self._tensors[key].contiguous()


class Renamed:
    """A file whose tensors are read by other names.

    Args:
        file: The file.
        names: Name in the file per new name. Tensors that it leaves out cannot be read.
    """

    def __init__(self, file: WeightsFile, names: Mapping[str, str]) -> None:
        self.path = file.path
        self._file, self._names = file, dict(sorted(names.items()))
        self.headers: Mapping[str, StoredTensor] = {new: file.headers[old] for new, old in self._names.items()}

    def stored(self, key: str) -> str:
        """Return the name in the file of a tensor."""
        return self._names[key]

    def read(self, key: str) -> Tensor:
        """Read one tensor by its new name."""
        return self._file.read(self._names[key])


def _check_archive(path: Path) -> None:
    """Refuse archives that could grow when read, and the format before torch 1.6, which is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise AdapterFormatError(
            f"{path} must be a whole archive of torch 1.6 or later: {one_line(error)}. "
            f"Fetch it again, or save it as {WEIGHTS}."
        ) from error
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
    if not stored or max(pickles, default=0) > MAX_PICKLE_BYTES:
        raise AdapterFormatError(
            f"{path} must hold its entries uncompressed, as torch writes them. Save the adapter as {WEIGHTS}."
        )


def open_weights(folder: Path, *, allow_pickle: bool) -> WeightsFile:
    """Open the weights of an adapter folder.

    Args:
        folder: The folder.
        allow_pickle: Read `adapter_model.bin` where there is no safetensors file.

    Raises:
        AdapterFormatError: there are none, or they are damaged.
    """
    if (folder / WEIGHTS).is_file():
        return Safetensors(folder / WEIGHTS)
    if (folder / f"{WEIGHTS}.index.json").is_file():
        raise AdapterFormatError(
            f"{folder} has its weights in several files with an index, which peft does not load either. Join them into "
            f"one {WEIGHTS}."
        )
    if (folder / "adapters.safetensors").is_file():
        raise AdapterFormatError(
            f"an adapter folder must hold {WEIGHTS}, and {folder} holds adapters.safetensors, the form of MLX. Convert "
            "it to a PEFT adapter."
        )
    if not (folder / PICKLE).is_file():
        raise AdapterFormatError(f"an adapter folder must hold {WEIGHTS}, and {folder} does not.")
    if not allow_pickle:
        raise AdapterFormatError(
            f"an adapter folder must hold {WEIGHTS}, and {folder} does not. {PICKLE} is a pickle, which is read with "
            "--allow-pickle only; or save it as safetensors with peft."
        )
    return Pickle(folder / PICKLE)
