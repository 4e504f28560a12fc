"""Adapters on disk and in memory: the border where PEFT's files become updates."""

from ..io.weight_files import StoredTensor
from .paths import open_adapters
from .peft_writer import adapter_size, write_adapter
from .source import AdapterSource, ModuleHeader, open_adapter
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
