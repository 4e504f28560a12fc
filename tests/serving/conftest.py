"""Registered adapters, and a stand-in for the parts of vLLM that the plugin uses, with the same names and arguments."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..factories import write_lora

SHAPES = {
    "model.layers.1.self_attn.q_proj": (32, 32, 4),
    "model.layers.1.self_attn.k_proj": (16, 32, 2),
    "model.layers.3.mlp.down_proj": (32, 48, 5),
}
BASE = "org/base"


@dataclass
class LoRARequest:
    """vLLM's struct, without the fields that have defaults."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class LoRAResolver(ABC):
    """vLLM's base class."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


@dataclass
class Registry:
    """vLLM's registry."""

    resolvers: dict[str, Any] = field(default_factory=dict)

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Stand-in modules in place of vLLM's; the registry that the plugin fills."""
    resolver, request = ModuleType("vllm.lora.resolver"), ModuleType("vllm.lora.request")
    result = Registry()
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = LoRAResolver, result  # type: ignore[attr-defined]
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    modules = {"vllm": ModuleType("vllm"), "vllm.lora": ModuleType("vllm.lora")}
    for name, module in (modules | {"vllm.lora.resolver": resolver, "vllm.lora.request": request}).items():
        monkeypatch.setitem(sys.modules, name, module)
    return result


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Folder with the adapters `task` and `align` of different ranks, and a folder without an adapter."""
    folder = tmp_path / "adapters"
    write_lora(folder / "task", SHAPES, base=BASE, alpha=5)
    write_lora(folder / "align", {path: (out, into, 3) for path, (out, into, _) in SHAPES.items()}, base=BASE, seed=1)
    (folder / "notes").mkdir()
    write_lora(tmp_path / "secret", SHAPES, base=BASE, seed=2)
    return folder
