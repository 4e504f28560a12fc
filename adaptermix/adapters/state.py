"""Frozen values that describe an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..algebra import LowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """How PEFT finds the modules of an adapter in a base model: the fields of a `LoraConfig`.

    Args:
        modules: Suffixes or full paths of modules, or one regular expression.
        layers: Numbers of the blocks to which suffixes are confined; None for all.
        layers_pattern: Name of the list of blocks, where PEFT's own guess does not do.
        exclude: Suffixes or paths to leave out, or one regular expression.
    """

    modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMeta:
    """What an adapter says of itself.

    Args:
        base: Base model as recorded at training, a Hub id or a folder.
        revision: Revision of the base model, if recorded.
        task_type: PEFT's task type (`CAUSAL_LM`, ...), if any.
        targets: How PEFT finds its modules.
        fan_in_fan_out: Whether the base keeps its weights as [in out] (GPT-2's Conv1D).
        manifest: Content of the `adaptermix.json` beside it; empty for adapters made elsewhere.
    """

    base: str | None
    targets: TargetSpec
    revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_fingerprint(self) -> str | None:
        """Hash of the base model's files, where the adapter was trained or merged by this toolkit."""
        base = self.manifest.get("base")
        fingerprint = base.get("fingerprint") if isinstance(base, Mapping) else None
        return fingerprint if isinstance(fingerprint, str) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterState:
    """A whole adapter in memory: what it says of itself, and one update per module path."""

    meta: AdapterMeta
    updates: Mapping[str, LowRank]
