"""Adapters of kohya's scripts, which are recognised to say how to convert them."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import AdapterFormatError

_MOST_HEADER = 2**26
"""Bytes of the header of a safetensors file that is looked at."""


def refuse_foreign(path: Path) -> None:
    """Refuse an adapter that another tool wrote in another format than PEFT's.

    Args:
        path: Folder or file.

    Raises:
        AdapterFormatError: it is an adapter of kohya's sd-scripts (one file with `lora_down` and `lora_up`).
    """
    try:
        is_peft = (path / "adapter_model.safetensors").is_file()
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        # A pipe is not a file: to open one would wait for another process.
        files = [file for file in files if file.suffix == ".safetensors" and file.is_file()]
        is_kohya = not is_peft and any(map(_is_kohya, files))
    except OSError:  # there is no such file, or its name is too long
        return
    if is_kohya:
        raise AdapterFormatError(
            f"an adapter must be in PEFT's format, and {path} is a LoRA of kohya's sd-scripts (lora_down, lora_up): "
            "convert it to PEFT first, for diffusion models with the loaders of diffusers.",
            code="adapter.kohya",
        )


def _is_kohya(file: Path) -> bool:
    """Return whether a safetensors file has the names of tensors that kohya's scripts write."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _MOST_HEADER:
            return False
        try:
            names = json.loads(stream.read(size))
        except (ValueError, RecursionError):
            return False
    return isinstance(names, dict) and any(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in names)
