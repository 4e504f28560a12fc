"""Adapters on disk and in memory: the border where PEFT's files become updates."""

from .peft_format import AdapterSource, open_adapter, write_adapter
from .state import AdapterMeta, AdapterState, TargetSpec

__all__ = ["AdapterMeta", "AdapterSource", "AdapterState", "TargetSpec", "open_adapter", "write_adapter"]
