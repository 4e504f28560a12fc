"""A fast hash that distinguishes the weight files of base models, without reading them in full."""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_SAMPLES, _SAMPLE_BYTES, _TENSOR_BYTES = 64, 2**16, 64
_MOST_HEADER = 2**27
_COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "chat_template*", "*.jinja", "*.model", "*.tiktoken"),
)


def fingerprint(folder: Path) -> str | None:
    """Return a hash of a model folder's weight files: names, sizes, 64 evenly spaced samples, and one of each tensor.

    The sample per tensor makes the hash change when an adapter was merged into only a few tensors of a base model.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            last = max(0, size - _SAMPLE_BYTES)
            for number in range(_SAMPLES):
                file.seek(last * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
            for offset in _tensor_offsets(file) if path.suffix == ".safetensors" else ():
                file.seek(offset)
                digest.update(file.read(_TENSOR_BYTES))
    return digest.hexdigest()


def companion_digest(folder: Path) -> str:
    """Return a hash of the other files that determine a model's results: its configuration and its tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _COMPANIONS):
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _tensor_offsets(file: BinaryIO) -> list[int]:
    """Return the offset of the middle of each tensor in a safetensors file; an empty list for a damaged file."""
    file.seek(0)
    try:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < _MOST_HEADER else {}
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return sorted(8 + length + (begin + end) // 2 for begin, end in spans)
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
