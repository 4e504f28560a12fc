"""Atomic writing of an output adapter: PEFT's two files, the manifest and the model card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch

from ..adapters import AdapterFile, AdapterState, write_adapter
from ..io.files import whole_folder, write_whole
from ..provenance import manifest
from .card import card
from .engines.vllm import VLLM_RANKS, vllm_limit

_LARGE = 0.5
"""Share of the base model's size above which an adapter is called large."""


class OutputSize(TypedDict):
    """Rank of an adapter, the largest of a compact one, and bytes of its weights file."""

    rank: int
    bytes: int


def output_size(state: AdapterState, *, dtype: torch.dtype = torch.float32, compact: bool = False) -> OutputSize:
    """Return the rank and the size that `write_output` would give an adapter, without computing it."""
    file = AdapterFile.of(state, dtype=dtype, compact=compact)
    return {"rank": file.rank, "bytes": file.size()}


def weight_bytes(folder: Path) -> int:
    """Return the size of a folder's weight files."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    return sum(path.stat().st_size for path in files)


def size_notes(size: int, base: Path | None) -> tuple[str, ...]:
    """Return a warning if an adapter is large compared with its base model, else nothing.

    Args:
        size: Bytes of the adapter.
        base: Folder of the base model, if it is known; a stack gets no warning.
    """
    # the weights next to a stack.json are its projection only, so a share of them says nothing
    whole = 0 if base is None or (base / "stack.json").is_file() else weight_bytes(base)
    if not whole or size <= _LARGE * whole:
        return ()
    return (
        f"warning: the adapter takes {megabytes(size)}, {size / whole:.0%} of the base model's {megabytes(whole)}. "
        "A smaller --rank, --compact or a 16-bit --dtype makes it smaller.",
    )


def size_sentence(rank: int, size: int) -> str:
    """Return rank and size of an adapter in words, with the limit on ranks that vLLM must be started with.

    Example:
        >>> size_sentence(24, 14_708_168)
        'rank 24, 14.7 MB; vLLM needs --max-lora-rank 32'
    """
    limit = vllm_limit(rank)
    vllm = f"vLLM takes ranks up to {VLLM_RANKS[-1]} only" if limit is None else f"vLLM needs --max-lora-rank {limit}"
    return f"rank {rank}, {megabytes(size)}; {vllm}"


def megabytes(size: int) -> str:
    """Return a number of bytes in words.

    Example:
        >>> megabytes(14_708_168)
        '14.7 MB'
    """
    return f"{size / 1e6:.3g} MB"


def write_documents(folder: Path, document: Mapping[str, object], *, name: str) -> None:
    """Write manifest and model card; the card's hash in the manifest allows later edits to be detected.

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
    document: Mapping[str, object],
    *,
    dtype: torch.dtype = torch.float32,
    compact: bool = False,
    overwrite: bool = False,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Write an output folder.

    Args:
        out: The folder.
        state: The adapter.
        document: Its manifest.
        dtype: Storage dtype of the factors.
        compact: Keep each module's rank; default is one rank for all.
        overwrite: Replace an existing adapter folder.
        extra: Further files by name (loss history, plots).

    Raises:
        OutputError: the folder exists or cannot be written.
    """
    with whole_folder(out, overwrite=overwrite) as folder:
        write_adapter(folder, state, dtype=dtype, compact=compact)
        write_documents(folder, document, name=out.name)
        for name, content in (extra or {}).items():
            write_whole(folder / name, content)
