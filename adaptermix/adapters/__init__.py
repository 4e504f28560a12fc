"""Adapters on disk and in memory: the border where PEFT's files become updates."""

from .paths import open_adapters
from .peft_format import AdapterSource, ModuleHeader, open_adapter
from .peft_writer import adapter_size, write_adapter
from .reader import StoredTensor
from .state import LINEAR, AdapterMeta, AdapterState, Layout, TargetSpec

__all__ = [
    "LINEAR",
    "AdapterMeta",
    "AdapterSource",
    "AdapterState",
    "Layout",
    "ModuleHeader",
    "StoredTensor",
    "TargetSpec",
    "adapter_size",
    "open_adapter",
    "open_adapters",
    "write_adapter",
]
