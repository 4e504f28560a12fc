"""A merge, fully decided before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from ..adapters import AdapterMeta, AdapterSource, TargetSpec
from ..errors import IncompatibleAdapters, PlanError
from ..methods.base import MergeMethod


def split_weight(weight: float) -> tuple[float, float]:
    """Return (w, 1 - w), rounded: 1 - 0.9 is 0.09999999999999998 in binary, and people mean 0.1."""
    return weight, round(1.0 - weight, 12)


def resolve_weights(names: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """Return one weight per adapter; a single weight w for two adapters means (w, 1 - w).

    Raises:
        PlanError: the counts do not match, or a weight is not finite.
    """
    weights = [float(weight) for weight in weights]  # so that 1, 1.0 and a NumPy scalar make one plan
    if len(names) == 2 and len(weights) == 1:
        weights = split_weight(weights[0])
    if len(weights) != len(names):
        raise PlanError(
            f"one weight per adapter is needed, got {len(weights)} for {len(names)} adapters ({', '.join(names)})."
            + (" With two adapters a single weight w means w and 1 - w." if len(names) == 2 else "")
        )
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise PlanError(f"weights must be finite numbers, got {weight} for adapter '{name}'.")
    return tuple(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """Inputs with their weights, the method, and the form of the result.

    Args:
        sources: Opened adapters.
        weights: One per adapter.
        method: What to do with the updates of one module.
        rank: Rank of the result, or None to keep what the method gives.
        options: Method options, for the manifest.
    """

    sources: tuple[AdapterSource, ...]
    weights: tuple[float, ...]
    method: MergeMethod
    rank: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise PlanError(f"--rank must be at least 1, got {self.rank}.")

    @property
    def modules(self) -> list[str]:
        """Every module that any of the adapters has, sorted."""
        return sorted(set().union(*(source.modules for source in self.sources)))

    def meta(self) -> AdapterMeta:
        """Return what the merged adapter says of itself."""
        metas = [source.meta for source in self.sources]
        first = metas[0]
        return AdapterMeta(
            base=first.base,
            revision=first.revision,
            task_type=next((meta.task_type for meta in metas if meta.task_type), None),
            targets=self._targets(),
            fan_in_fan_out=first.fan_in_fan_out,
        )

    def _targets(self) -> TargetSpec:
        """An input that covers every module lends its targets; otherwise they are listed by full path."""
        modules = self.modules
        for source in self.sources:
            if len(source.modules) == len(modules):
                return source.meta.targets
        return TargetSpec(modules=tuple(modules))


def check(sources: Sequence[AdapterSource], *, allow_base_mismatch: bool = False) -> None:
    """Refuse adapters that do not belong together, from their headers alone.

    Raises:
        IncompatibleAdapters: other bases (unless allowed), other shapes of a module, or other weight layouts.
    """
    for source in sources:
        if source.beyond_linear:
            raise IncompatibleAdapters(
                f"only plain LoRAs on linear layers can be merged, and '{source.name}' has "
                f"{', '.join(source.beyond_linear)}."
            )
    # Every pair, since an adapter that records less than the others can stand between two that differ.
    for one, other in combinations(sources, 2):
        if not allow_base_mismatch:
            _check_base(one, other)
        if one.meta.fan_in_fan_out != other.meta.fan_in_fan_out:
            raise IncompatibleAdapters(
                f"adapters '{one.name}' and '{other.name}' must agree on fan_in_fan_out, and do not."
            )
    seen: dict[str, tuple[str, int, int]] = {}
    for source in sources:
        for module, header in source.modules.items():
            name, out, into = seen.setdefault(module, (source.name, header.out, header.into))
            if (out, into) != (header.out, header.into):
                raise IncompatibleAdapters(
                    f"module '{module}': update shapes must be equal, found '{name}' [{out} {into}] and "
                    f"'{source.name}' [{header.out} {header.into}]. The adapters belong to different base models."
                )


def _check_base(one: AdapterSource, other: AdapterSource) -> None:
    marks = one.meta.base_fingerprint, other.meta.base_fingerprint
    if None not in marks:
        same = marks[0] == marks[1]
    else:
        same = (one.meta.base, one.meta.revision) == (other.meta.base, other.meta.revision)
    if not same:
        raise IncompatibleAdapters(
            f"adapters '{one.name}' and '{other.name}' must come from one base model, found {_base(one)} and "
            f"{_base(other)}. If the two are the same model under two names, pass --allow-base-mismatch."
        )


def _base(source: AdapterSource) -> str:
    revision = f"@{source.meta.revision}" if source.meta.revision else ""
    return f"'{source.meta.base}{revision}'"
