"""Public one-line calls that have no better home."""

from __future__ import annotations

from pathlib import Path

from . import AdapterState, open_adapter


def load_adapter(path: str | Path) -> AdapterState:
    """Read a PEFT LoRA folder: what it says of itself, and one low-rank update per module.

    Raises:
        AdapterFormatError: the folder is damaged, or holds what is not handled.
    """
    return open_adapter(path).read()
