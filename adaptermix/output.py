"""An output adapter: PEFT's two files, the manifest and the model card, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import manifest
from .adapters import AdapterState, write_adapter
from .files import whole_folder, write_whole
from .publish.card import card


def write_output(
    out: Path,
    state: AdapterState,
    document: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Write an output folder.

    Args:
        out: The folder.
        state: The adapter.
        document: Its manifest, or what makes it once the adapter is written.
        dtype: Storage dtype of the factors.
        overwrite: Replace an existing adapter folder.
        extra: Further files by name (loss history, plots).

    Raises:
        OutputError: the folder exists or cannot be written.
    """
    with whole_folder(out, overwrite=overwrite) as folder:
        write_adapter(folder, state, dtype=dtype)
        made = document() if callable(document) else document
        manifest.write(folder, made)
        (folder / "README.md").write_text(card(made, name=out.name), encoding="utf-8")
        for name, content in (extra or {}).items():
            write_whole(folder / name, content)
