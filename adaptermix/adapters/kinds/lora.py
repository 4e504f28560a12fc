"""What every kind of adapter module can do; a plain LoRA is its simplest case."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...algebra import LowRank, Update
from ...errors import AdapterFormatError
from ...io.json_types import JsonObject
from ..keys import FACTORS, LORA_TENSOR
from ..lora_config import CONFIG, LoraSettings, read_config
from ..module import LINEAR, AdapterModule, Layout, ModuleHeader
from ..state import AdapterMeta


class AdapterKind:
    """A kind of adapter module: how its tensors change the weight that they belong to.

    A plain LoRA adds the product of its factors to every weight. Other kinds override the methods that differ, and are
    listed in `adapters.kinds.KINDS`. An adapter may be of several kinds, such as a DoRA that started as a PiSSA.
    """

    peft_type: ClassVar[str] = "LORA"
    """PEFT's name of the file format. A kind with another format also overrides the next six names."""
    mark: ClassVar[str] = ".lora_"
    """What follows the path of a module in the names of its tensors."""
    parts: ClassVar[re.Pattern[str]] = LORA_TENSOR
    """Names of tensors in the file, with the groups `module` and `part`."""

    has_own_sum = False
    """Whether a weighted sum of modules of this kind is again one, by `sum`."""

    def settings(self, config: JsonObject, path: Path, manifest: Mapping[str, object]) -> LoraSettings:
        """Read the settings of an adapter.

        Args:
            config: Content of its `adapter_config.json`.
            path: That file, for messages.
            manifest: The manifest in its folder, or an empty mapping.

        Raises:
            AdapterFormatError: a setting is malformed, or not supported.
        """
        return read_config(config, path, manifest)

    def header(
        self, path: Path, module: str, shapes: Mapping[str, tuple[int, ...]], settings: LoraSettings
    ) -> ModuleHeader:
        """Return the header of a module, from the shapes of its parts.

        Raises:
            AdapterFormatError: parts are missing, or contradict each other or the settings.
        """
        return _header(path, module, shapes, settings)

    def factors(self, parts: Mapping[str, Tensor], header: ModuleHeader) -> tuple[Tensor, Tensor]:
        """Return the factors A and B of a module as matrices.

        Args:
            parts: The tensors of the module by the names of the parts.
            header: The header of the module.

        Shapes: [r in] and [out r]. A kind whose file lacks a side of the weight has 1 there, and gives the whole
            update in `module`.
        """
        a, b = (parts[name] for name in FACTORS[header.layout.kind])
        return a.reshape(header.rank, header.into), b.reshape(header.out, header.rank)

    def is_of(self, meta: AdapterMeta) -> bool:
        """Return whether an adapter is of this kind."""
        return meta.peft_type == self.peft_type

    def describe(self, meta: AdapterMeta) -> AdapterMeta:
        """Return the description of an adapter of this kind, from the description of a plain LoRA."""
        return meta

    def missing_base(self, names: Sequence[str]) -> str:
        """Return the message for adapters of this kind that are used without their base model.

        Args:
            names: Names of the adapters.
        """
        raise NotImplementedError

    def module(self, module: AdapterModule, weight: Callable[[], Float[Tensor, "out in"]]) -> AdapterModule:
        """Return a module whose factors are an update of the base weight, from the factors in the file.

        Args:
            module: The module as the file has it.
            weight: Reads the base weight.
        """
        return module

    def delta(self, module: AdapterModule, weight: Callable[[], Float[Tensor, "out in"]]) -> Update:
        """Return the delta: the difference that the module makes to its weight."""
        return module.update

    def sum(
        self, modules: Sequence[AdapterModule], coefficients: Sequence[float], weight: Float[Tensor, "out in"]
    ) -> AdapterModule:
        """Return the weighted sum of the deltas of some modules as one module of this kind.

        Raises:
            ValueError: no module of this kind gives the sum.
        """
        raise NotImplementedError

    def with_update(self, module: AdapterModule, update: LowRank, weight: Float[Tensor, "out in"]) -> AdapterModule:
        """Return the module with factors that were truncated or rounded, and the other parts fitted to them."""
        raise NotImplementedError


def less(update: LowRank, left: Tensor, right: Tensor) -> LowRank:
    """Return an update less a product of two factors, with both sides of the product balanced."""
    dtype = torch.promote_types(update.a.dtype, torch.float32)
    lengths = right.norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny).sqrt()
    left, right = left * lengths, right / lengths[:, None]
    return LowRank(
        b=torch.cat([update.b.to(dtype), -left.to(dtype)], dim=1),
        a=torch.cat([update.scale * update.a.to(dtype), right.to(dtype)]),
    )


def _layout(path: Path, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Return a module's layout from the names and shapes of its factors, and check that they fit together."""
    is_embedding = any("embedding" in part for part in shapes)
    kind: Literal["embedding", "linear"] = "embedding" if is_embedding else "linear"
    if {"lora_A.weight", "lora_B.weight"} & set(shapes) and kind == "embedding":
        raise AdapterFormatError(
            f"{path}: module {module!r} must be either an embedding or not, and has factors of both.",
            code="adapter-file.mixed-factors",
        )
    for part in FACTORS[kind]:
        if part not in shapes:
            raise AdapterFormatError(
                f"{path}: module {module!r} must have both factors, {part.removesuffix('.weight')} is missing.",
                code="adapter-file.missing-factor",
            )
    a, b = (shapes[part] for part in FACTORS[kind])
    if kind == "linear" and 3 <= len(a) <= 5 and len(b) == len(a):
        if set(b[2:]) == {1} and b[1] < a[0] and a[0] % b[1] == 0:
            raise AdapterFormatError(
                f"{path}: module {module!r} is a grouped convolution (lora_A {list(a)}, lora_B {list(b)}), whose delta "
                "is not the product of its factors, and is not handled.",
                code="adapter-file.grouped-convolution",
            )
        if set(b[2:]) == {1}:
            return Layout(kind="convolution", kernel=a[2:])
    if len(a) != 2 or len(b) != 2:
        raise AdapterFormatError(
            f"{path}: module {module!r} must have matrices for factors, or the kernels of a convolution, "
            f"found lora_A {list(a)} and lora_B {list(b)}.",
            code="adapter-file.factor-axes",
        )
    return Layout(kind=kind)


def _check_variants(path: Path, module: str, layout: Layout, parts: Iterable[str], settings: LoraSettings) -> None:
    """Check that magnitudes and biases are exactly where the settings name them."""
    if settings.meta.dora and layout != LINEAR:
        raise AdapterFormatError(
            f"{path}: module {module!r} is a DoRA {layout}, which is not handled; linear ones are.",
            code="adapter-file.dora-kind",
        )
    for part, said, setting in (
        ("lora_magnitude_vector", settings.meta.dora, "use_dora"),
        ("lora_B.bias", settings.lora_bias, "lora_bias"),
    ):
        if said != (part in parts):
            wrong = "is missing" if said else f"is there, but {setting} is not set, so peft would drop it"
            raise AdapterFormatError(
                f"{path}: module {module!r} must be as {CONFIG} says, and its {part} {wrong}.",
                code="adapter-file.variant",
            )


def _header(path: Path, module: str, shapes: Mapping[str, tuple[int, ...]], settings: LoraSettings) -> ModuleHeader:
    layout = _layout(path, module, shapes)
    a, b = (shapes[part] for part in FACTORS[layout.kind])
    rank = settings.rank_of(module)
    if not a[0] == b[1] == rank:
        raise AdapterFormatError(
            f"{path}: module {module!r} must have rank {rank} as {CONFIG} says, "
            f"found lora_A {list(a)} and lora_B {list(b)}.",
            code="adapter-file.rank",
        )
    _check_variants(path, module, layout, shapes, settings)
    for part in ("lora_magnitude_vector", "lora_B.bias"):
        if shapes.get(part, (b[0],)) != (b[0],):
            raise AdapterFormatError(
                f"{path}: module {module!r} must have a {part} of shape [{b[0]}], found {list(shapes[part])}.",
                code="adapter-file.part-shape",
            )
    scale = settings.scale_of(module)
    if not math.isfinite(scale):
        raise AdapterFormatError(
            f"{path}: the scale of module {module!r} must be finite, found {scale}.", code="adapter-file.scale"
        )
    return ModuleHeader(
        out=b[0],
        into=math.prod(a[1:]),
        rank=rank,
        scale=scale,
        layout=layout,
        bias="lora_B.bias" in shapes,
        magnitude="lora_magnitude_vector" in shapes,
    )
