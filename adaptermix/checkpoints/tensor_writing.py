"""A checkpoint written tensor by tensor, shard by shard, where a weight may become several tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..io.safetensors_writer import Headers, write_tensors
from .writing import named_shards, write_index


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return what tensors take in a file."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_shards(folder: Path, groups: Iterator[Mapping[str, Tensor]], *, limit: int) -> int:
    """Write groups of tensors, each of which stays in one file, and the index; return the bytes of all.

    Args:
        folder: An existing folder.
        groups: Tensors by name.
        limit: Size that no file exceeds, unless a single group does; as much is in memory.
    """
    files: list[Path] = []
    headers: list[Headers] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        files.append(folder / f".part-{len(files):05d}.safetensors")
        headers.append({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()})
        write_tensors(files[-1], held, {"format": "pt"})
        held.clear()

    for group in groups:
        if held and bytes_of(held) + bytes_of(group) > limit:
            flush()
        held.update(group)
        total += bytes_of(group)
    if held:
        flush()
    shards = named_shards(headers)
    for path, shard in zip(files, shards, strict=True):
        path.rename(folder / shard.file)
    write_index(folder, shards)
    return total
