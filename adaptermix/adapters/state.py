"""Frozen values that describe an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..algebra import LowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """How PEFT finds the modules of an adapter in a base model: the fields of a `LoraConfig`.

    Args:
        modules: Suffixes or full paths of modules, or one regular expression.
        layers: Numbers of the blocks to which suffixes are confined; None for all.
        layers_pattern: Name of the list of blocks, where PEFT's own guess does not do.
        exclude: Suffixes or paths to leave out, or one regular expression.
        tied: Whether PEFT also adapts the module that shares its weight with a target (`ensure_weight_tying`).
    """

    modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | str | None = None
    tied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the two factors of a module lie in PEFT's file.

    Args:
        kind: "linear": `lora_A.weight` [r in] and `lora_B.weight` [out r]. "embedding": `lora_embedding_A` [r num] and
            `lora_embedding_B` [dim r], so the update is [dim num], the transpose of the table. "convolution":
            `lora_A.weight` [r in *kernel] and `lora_B.weight` [out r 1 ..], so the update is [out in*prod(kernel)].
        kernel: Sides of the kernel; empty unless a convolution.

    Grouped convolutions: PEFT 0.21 gives `lora_B` only r/groups columns there, and such a file is refused. Releases
    before it stored them like any other convolution, so the file does not tell: the adapter is read and merged as it
    acts (a full convolution), and a newer PEFT refuses it, as it would refuse the input.
    """

    kind: Literal["linear", "embedding", "convolution"] = "linear"
    kernel: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {list(self.kernel)}" if self.kernel else self.kind


LINEAR = Layout()
INPUT_EMBEDDINGS = ""


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
        dora: Whether each module has a magnitude beside its update (DoRA).
        saved_modules: Names of fully trained modules (PEFT's `modules_to_save`), such as heads.
        bias: Which biases of the base were trained: "none", "all" or "lora_only".
        trainable_tokens: Ids of the tokens whose embeddings were trained, per name of an embedding. PEFT's list form
            stands under the name "" and means the input embeddings.
        fusion: Settings of a fusion in the bottleneck (FLARE), which is no change of weights; empty for others.
        initial: "pissa" or "olora" where training began from a part of the base weight, so that the factors alone are
            not the delta (see `adapters.convert`); None for plain ones.
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
    fusion: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_fingerprint(self) -> str | None:
        """Hash of the base model's files, where the adapter was trained or merged by this toolkit."""
        base = self.manifest.get("base")
        fingerprint = base.get("fingerprint") if isinstance(base, Mapping) else None
        return fingerprint if isinstance(fingerprint, str) else None


def beyond_linear(meta: AdapterMeta, *, biases: bool, saved: bool, layouts: Mapping[str, Layout]) -> tuple[str, ...]:
    """Name what an adapter holds beyond updates of linear modules, for code that would leave it out.

    Args:
        meta: What the adapter says of itself.
        biases: Whether it has biases inside the LoRA.
        saved: Whether it has tensors that are kept whole.
        layouts: Its modules that are not linear.
    """
    kinds = {layout.kind for layout in layouts.values()}
    found = {
        "DoRA magnitudes (use_dora)": meta.dora,
        "a fusion with a source text": bool(meta.fusion),
        f"a start from the base weights (init_lora_weights={meta.initial!r})": meta.initial is not None,
        "biases (lora_bias)": biases,
        "fully trained tensors (modules_to_save, bias, trainable_token_indices)": saved,
        "embeddings": "embedding" in kinds,
        "convolutions": "convolution" in kinds,
    }
    return tuple(name for name, there in found.items() if there)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterState:
    """A whole adapter in memory: what it says of itself, and what it adds to each module.

    Args:
        meta: What it says of itself.
        updates: Update per module path.
        biases: What the bias inside the LoRA adds to a module's output, already multiplied by the LoRA's scale.
        magnitudes: DoRA's magnitude per module.
        saved: Whole tensors that replace those of the base, by their full name in the file: modules_to_save, trained
            biases of the base, embedding rows of trainable tokens, and copies of resized embeddings.
        layouts: How the factors lie in the file, for modules that are not linear.

    Shapes: updates are [out in]; biases and magnitudes [out].
    """

    meta: AdapterMeta
    updates: Mapping[str, LowRank]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    @property
    def beyond_linear(self) -> tuple[str, ...]:
        """What it holds beyond updates of linear modules, in words; empty for a plain LoRA."""
        return beyond_linear(self.meta, biases=bool(self.biases), saved=bool(self.saved), layouts=self.layouts)
