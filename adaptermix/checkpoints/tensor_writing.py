"""Write a checkpoint file by file; a weight may consist of several tensors, which stay in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..io.safetensors_writer import Headers, write_tensors
from .writing import named_shards, write_index


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of tensors in a file."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_shards(folder: Path, groups: Iterator[Mapping[str, Tensor]], *, limit: int) -> int:
    """Write groups of tensors, each within one file, and the index; return the total size in bytes.

    Args:
        folder: An existing folder.
        groups: Tensors by name.
        limit: Size that no file exceeds, unless a single group does. Also the memory that is needed, since a file is
            collected before it is written.
    """
    files: list[Path] = []
    headers: list[Headers] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        files.append(folder / f".part-{len(files):05d}.safetensors")
        headers.append({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in pending.items()})
        write_tensors(files[-1], pending, {"format": "pt"})
        pending.clear()

    for group in groups:
        if pending and bytes_of(pending) + bytes_of(group) > limit:
            flush()
        pending.update(group)
        total += bytes_of(group)
    if pending:
        flush()
    shards = named_shards(headers)
    for path, shard in zip(files, shards, strict=True):
        path.rename(folder / shard.file)
    write_index(folder, shards)
    return total
