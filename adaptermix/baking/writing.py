"""A checkpoint written tensor by tensor, shard by shard, where a weight may become several tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..adapters.writer import write_tensors
from ..checkpoints import INDEX, SINGLE


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return what tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_shards(folder: Path, groups: Iterator[Mapping[str, Tensor]], *, limit: int) -> int:
    """Write groups of tensors, each of which stays in one file, and the index; return the bytes of all.

    Args:
        folder: An existing folder.
        groups: Tensors by name.
        limit: Size that no file exceeds, unless a single group does; as much is in memory.
    """
    files: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    parameters, total = 0, 0

    def flush() -> None:
        files.append(folder / f".part-{len(files):05d}.safetensors")
        write_tensors(files[-1], held, {"format": "pt"})
        where.update(dict.fromkeys(held, len(files) - 1))
        held.clear()

    for group in groups:
        if held and bytes_of(held) + bytes_of(group) > limit:
            flush()
        held.update(group)
        total += bytes_of(group)
        parameters += sum(math.prod(tensor.shape) for tensor in group.values())
    if held:
        flush()
    if len(files) == 1:
        files[0].rename(folder / SINGLE)
        return total
    stem, ending = SINGLE.split(".", 1)
    names = [f"{stem}-{number:05d}-of-{len(files):05d}.{ending}" for number in range(1, len(files) + 1)]
    for path, name in zip(files, names, strict=True):
        path.rename(folder / name)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": {name: names[number] for name, number in sorted(where.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
