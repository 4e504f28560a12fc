"""Free memory and free disk space."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device's memory."""
    if device.type == "cuda":
        # Memory that torch has reserved but not allocated is free as well.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return int(psutil.virtual_memory().available)


def free_disk(folder: Path) -> int:
    """Return the free bytes on a folder's disk; 0 if its files are in memory (tmpfs)."""
    kinds = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    resolved = folder.resolve()
    kind = next((kinds[parent] for parent in (resolved, *resolved.parents) if parent in kinds), "")
    return 0 if kind in _IN_MEMORY else shutil.disk_usage(resolved).free
