"""Frozen values that describe an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..algebra import LowRank
from ..errors import as_line
from .module import AdapterModule, ModuleHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """How PEFT finds the modules of an adapter in a base model: the fields of a `LoraConfig`.

    Args:
        modules: Suffixes or full paths of modules, or one regular expression.
        layers: Numbers of the blocks to which suffixes are confined; None for all.
        layers_pattern: Name of the list of blocks, where PEFT's own guess is wrong.
        exclude: Suffixes or paths to leave out, or one regular expression.
        tied: Whether PEFT also adapts the module that shares its weight with a target (`ensure_weight_tying`).
    """

    modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | str | None = None
    tied: bool = False


INPUT_EMBEDDINGS = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMeta:
    """The description of an adapter.

    Args:
        base: Base model as recorded at training, a Hub id or a folder.
        revision: Revision of the base model, if recorded.
        task_type: PEFT's task type (`CAUSAL_LM`, ...), if any.
        targets: How PEFT finds its modules.
        fan_in_fan_out: Whether the base keeps its weights as [in out] (GPT-2's Conv1D).
        manifest: Content of the `adaptermix.json` in its folder; empty for adapters from other programs.
        dora: Whether each module has a magnitude and an update (DoRA).
        saved_modules: Names of fully trained modules (PEFT's `modules_to_save`), such as heads.
        bias: Which biases of the base were trained: "none", "all" or "lora_only".
        trainable_tokens: Ids of the tokens whose embeddings were trained, per name of an embedding. PEFT's list form
            has the name "" and means the input embeddings.
        fusion: Settings of a fusion in the bottleneck (FLARE), which does not change weights; empty for others.
        peft_type: PEFT's name of the file format.
        initial: "pissa" or "olora" if training started from a part of the base weight, so that the factors alone are
            not the delta (see `adapters.kinds`); None for plain ones.
    """

    base: str | None
    targets: TargetSpec
    revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    manifest: Mapping[str, Any] = field(default_factory=dict)
    dora: bool = False
    saved_modules: tuple[str, ...] = ()
    bias: str = "none"
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    initial: str | None = None
    fusion: Mapping[str, object] = field(default_factory=dict)
    peft_type: str = "LORA"

    @property
    def base_fingerprint(self) -> str | None:
        """Hash of the base model's files, where the adapter was trained or merged by this toolkit."""
        base = self.manifest.get("base")
        fingerprint = base.get("fingerprint") if isinstance(base, Mapping) else None
        return fingerprint if isinstance(fingerprint, str) else None


def beyond_linear(meta: AdapterMeta, modules: Iterable[ModuleHeader], *, saved: bool) -> tuple[str, ...]:
    """Name what an adapter has beyond updates of linear modules, for code that would leave it out.

    Args:
        meta: Description of the adapter.
        modules: Headers of its modules.
        saved: Whether it has whole tensors.
    """
    headers = list(modules)
    kinds = {header.layout.kind for header in headers}
    features = {
        "DoRA magnitudes (use_dora)": meta.dora,
        "a fusion with a source text": bool(meta.fusion),
        f"factors of another kind (peft_type={meta.peft_type!r})": meta.peft_type != "LORA",
        f"a start from the base weights (init_lora_weights={meta.initial!r})": meta.initial is not None,
        "biases (lora_bias)": any(header.bias for header in headers),
        "fully trained tensors (modules_to_save, bias, trainable_token_indices)": saved,
        "embeddings": "embedding" in kinds,
        "convolutions": "convolution" in kinds,
    }
    return tuple(name for name, is_present in features.items() if is_present)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterState:
    """A whole adapter in memory.

    Args:
        meta: Description of the adapter.
        modules: What it adds, per module path.
        saved: Whole tensors that replace those of the base, by their full name in the file: modules_to_save, trained
            biases of the base, embedding rows of trainable tokens, and copies of resized embeddings.
    """

    meta: AdapterMeta
    modules: Mapping[str, AdapterModule]
    saved: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        ranks = sorted({module.update.rank for module in self.modules.values()})
        label = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
        return f"AdapterState({len(self.modules)} modules, rank {label or 0}, base {as_line(self.meta.base, 60)!r})"

    @classmethod
    def of_updates(
        cls, meta: AdapterMeta, updates: Mapping[str, LowRank], saved: Mapping[str, Tensor] = MappingProxyType({})
    ) -> AdapterState:
        """Return an adapter of plain linear modules, from an update per module path."""
        modules = {module: AdapterModule(update=update) for module, update in updates.items()}
        return cls(meta=meta, modules=modules, saved=saved)

    @property
    def updates(self) -> dict[str, LowRank]:
        """Update per module path."""
        return {path: module.update for path, module in self.modules.items()}

    @property
    def headers(self) -> dict[str, ModuleHeader]:
        """Shapes and parts per module path."""
        return {path: module.header for path, module in self.modules.items()}

    @property
    def beyond_linear(self) -> tuple[str, ...]:
        """What it has beyond updates of linear modules, in words; empty for a plain LoRA."""
        return beyond_linear(self.meta, self.headers.values(), saved=bool(self.saved))
