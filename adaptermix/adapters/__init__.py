"""Adapters on disk and in memory: the border where PEFT's files become updates."""

from ..io.weight_files import StoredTensor
from .module import LINEAR, AdapterModule, Layout, ModuleHeader
from .paths import open_adapters
from .peft_writer import AdapterFile, adapter_writer, write_adapter
from .source import AdapterSource, open_adapter
from .state import AdapterMeta, AdapterState, TargetSpec

__all__ = [
    "LINEAR",
    "AdapterFile",
    "AdapterMeta",
    "AdapterModule",
    "AdapterSource",
    "AdapterState",
    "Layout",
    "ModuleHeader",
    "StoredTensor",
    "TargetSpec",
    "adapter_writer",
    "open_adapter",
    "open_adapters",
    "write_adapter",
]
