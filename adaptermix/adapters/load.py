"""Load an adapter in one call."""

from __future__ import annotations

from pathlib import Path

from . import AdapterState, open_adapter


def load_adapter(path: str | Path) -> AdapterState:
    """Read a PEFT LoRA folder: its description, and one low-rank update per module.

    Raises:
        AdapterFormatError: the folder is damaged, or contains a part that is not supported.
    """
    return open_adapter(path).read()
