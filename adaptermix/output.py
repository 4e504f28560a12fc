"""An output adapter: PEFT's two files, the manifest and the model card, whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import manifest
from .adapters import AdapterState, write_adapter
from .files import whole_folder, write_whole
from .publish.card import card


def write_documents(folder: Path, document: Mapping[str, Any], *, name: str) -> None:
    """Write manifest and model card; the manifest has the card's hash, which tells later whether somebody edited it.

    Args:
        folder: The output folder.
        document: The manifest.
        name: Title of the card.
    """
    text = card(document, name=name)
    manifest.write(folder, {**document, "card_sha256": hashlib.sha256(text.encode()).hexdigest()})
    (folder / "README.md").write_bytes(text.encode())


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
        write_documents(folder, made, name=out.name)
        for name, content in (extra or {}).items():
            write_whole(folder / name, content)
