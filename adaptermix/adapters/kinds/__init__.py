"""The kinds of adapter modules: plain LoRA, and those whose delta depends on the base weight. A kind is a file here."""

from __future__ import annotations

from pathlib import Path

from ...errors import AdapterFormatError
from ...io.json_types import JsonObject
from ..lora_config import label
from ..state import AdapterMeta
from .dora import Dora
from .lora import AdapterKind
from .olora import Olora
from .pissa import Pissa

__all__ = ["KINDS", "AdapterKind", "kind_of_file", "kind_of_type", "kinds_of"]

KINDS: tuple[AdapterKind, ...] = (Pissa(), Olora(), Dora())
"""In the order in which they act on what the file holds: the last kind of an adapter gives its delta."""


_READERS = {kind.peft_type: kind for kind in (*KINDS, AdapterKind())}
"""The kind that reads the files of each of PEFT's types; a plain LoRA reads those of all kinds of LoRA."""


def kinds_of(meta: AdapterMeta) -> tuple[AdapterKind, ...]:
    """Return the kinds that an adapter is of; none for a plain LoRA."""
    return tuple(kind for kind in KINDS if kind.is_of(meta))


def kind_of_type(peft_type: str) -> AdapterKind:
    """Return the kind that reads adapters of one of PEFT's types."""
    return _READERS[peft_type]


def kind_of_file(config: JsonObject, path: Path) -> AdapterKind:
    """Return the kind that reads the adapter of an `adapter_config.json`.

    Args:
        config: The content of the file.
        path: The file, for messages.

    Raises:
        AdapterFormatError: no kind reads it.
    """
    if "fine_tune_type" in config and "peft_type" not in config:
        raise AdapterFormatError(
            f"{path} must be PEFT's, and is of an MLX adapter. Convert it to a PEFT adapter.", code="config.mlx"
        )
    kind = _READERS.get(str(config.get("peft_type")))
    if kind is None:
        raise AdapterFormatError(
            f"{path}: only peft_type {' or '.join(map(repr, _READERS))} is handled, "
            f"found {label(config.get('peft_type'))}.",
            code="config.peft-type",
        )
    return kind
