"""How much memory is free, and how much of a disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that are free."""
    if device.type == "cuda":
        # what torch holds and has not given away is free too
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + own
    return int(psutil.virtual_memory().available)


def free_disk(folder: Path) -> int:
    """Return the bytes that are free where a folder is; none where its files lie in memory."""
    kinds = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    kind = next((kinds[parent] for parent in (place, *place.parents) if parent in kinds), "")
    return 0 if kind in _IN_MEMORY else shutil.disk_usage(place).free
