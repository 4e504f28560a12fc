"""The settings of a launcher (`accelerate launch`, `torchrun`) for this process, read without importing torch."""

from __future__ import annotations

import os


def process_count() -> int:
    """Return how many processes share this run; 1 without a launcher."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if named else 1


def is_main_process() -> bool:
    """Return whether this is the process that writes files and prints."""
    return process_count() == 1 or os.environ["RANK"] == "0"


def is_launched() -> bool:
    """Return whether a launcher set several processes or a precision."""
    return process_count() > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ


def precision() -> str:
    """Return the mixed precision that the launcher asks for: no, bf16, fp16 or fp8."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def asks_for(name: str) -> bool:
    """Return whether the launcher has set one of its switches, such as ACCELERATE_USE_FSDP."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")
