"""The plan of a merge, which is complete before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..adapters import LINEAR, AdapterMeta, AdapterSource, ModuleHeader, TargetSpec
from ..adapters.kinds import AdapterKind, kinds_of
from ..adapters.paths import in_model, two_roots
from ..errors import IncompatibleAdapters
from ..io.checkpoint_files import Checkpoint
from ..io.json_types import JsonObject
from ..methods.base import MergeMethod, build, is_weighted_sum
from ..tasks.heads.from_adapters import form_of_head
from .output_form import Shape
from .overrides import Override, depths_of
from .weights import numbered, resolve_weights, split_weight
from .whole_tensors import AVERAGE, merge_extras, merge_saved, resolve_policy

__all__ = ["MergePlan", "check", "resolve_weights", "split_weight"]

Fill = Literal["weight", "one"]
_CACHED = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/")
HALF = ("F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Inputs with their weights, the method, and the form of the result.

    Args:
        sources: Opened adapters.
        weights: One per adapter.
        method: What to do with the updates of one module.
        shape: Form of the result.
        overrides: Other weights or method options for some modules; later overrides win.
        fill: Weight of an adapter in a module that no other adapter changes: "weight" for its own weight, "one" for 1.
            An adapter that lacks the module, or whose update is exactly zero, does not change it.
        seed: Seed of random methods.
        checkpoint: The base model, for adapters whose delta depends on it.
        statistics: Statistics of the modules of each adapter, for methods that need them.
        saved: How fully trained tensors are merged; see `whole_tensors.merge_saved`.
        options: Method options, for the manifest.
        keep_heads: Whether fully trained tensors of adapters with weight 0 are merged too.
        entries: Further entries of the manifest, from the function that learned the weights.
    """

    sources: tuple[AdapterSource, ...]
    weights: tuple[float, ...]
    method: MergeMethod
    shape: Shape = field(default_factory=Shape)
    overrides: tuple[Override, ...] = ()
    fill: Fill = "weight"
    seed: int = 0
    checkpoint: Checkpoint | None = None
    statistics: tuple[Checkpoint, ...] = ()
    saved: str | int = "refuse"
    options: Mapping[str, object] = field(default_factory=dict)
    keep_heads: bool = False
    entries: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def modules(self) -> list[str]:
        """Every module that any of the adapters has, sorted."""
        return sorted(set().union(*(source.modules for source in self.sources)))

    @cached_property
    def depths(self) -> dict[str, int]:
        """Number of blocks of each stack: one more than the highest block that an adapter changes."""
        return depths_of(self.modules)

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """Keys of the random draws, one per adapter.

        A key depends on the values of the adapter, not on its storage, its name or its position. Adapters with equal
        values are numbered by their weights.
        """
        if not self.method.is_random:
            return tuple(str(index) for index in range(len(self.sources)))
        points = [self.weights, *(point for override in self.overrides for point in override.points)]
        return numbered(
            [source.values_digest for source in self.sources],
            [tuple(point[index] for point in points) for index in range(len(self.sources))],
        )

    @cached_property
    def sum_kind(self) -> AdapterKind | None:
        """The kind of the result: that of the first adapter whose kind defines a sum; None for a plain LoRA.

        The result is plain if a module has a bias or is an embedding or a convolution: PEFT has no DoRA with a bias,
        and computes a DoRA of an embedding or a convolution in another way.
        """
        headers = [header for source in self.sources for header in source.modules.values()]
        is_plain = all(header.layout == LINEAR and not header.bias for header in headers)
        if not is_plain or not is_weighted_sum(self.method) or self.shape.form == "dense":
            return None
        kinds = [kind for source in self.sources for kind in kinds_of(source.meta) if kind.has_own_sum]
        return kinds[0] if kinds else None

    @property
    def are_plain(self) -> bool:
        """Whether all adapters are plain LoRAs, whose factors are their whole delta."""
        return not any(kinds_of(source.meta) for source in self.sources)

    @property
    def writes_checkpoint(self) -> bool:
        """Whether the result is a full checkpoint."""
        return self.shape.form == "dense" and self.checkpoint is not None

    def header(self, module: str) -> ModuleHeader:
        """Return the header of a module in the first adapter that has it."""
        return next(source.modules[module] for source in self.sources if module in source.modules)

    def weights_at(self, module: str) -> tuple[float, ...]:
        """Return the weights at a module, before `filled` changes them."""
        weights = self.weights
        for override in self.overrides:
            if override.covers(module):
                weights = override.weights(module) or weights
        return weights

    def statistics_name(self, index: int, module: str) -> str | None:
        """Return the name of a module's tensor in the statistics of an adapter; None if they lack the module.

        A statistics file has the paths of the class that its adapter was trained in.
        """
        tensors = self.statistics[index].tensors
        name = in_model([module], tensors)[module]
        return name if name in tensors else None

    def method_at(self, module: str) -> MergeMethod:
        """Return the method at a module, with the options of its overrides."""
        options: JsonObject = {}
        for override in self.overrides:
            if override.options and override.covers(module):
                options |= override.options
        return build(self.method.title, {**self.options, **options}) if options else self.method

    def filled(self, weights: Sequence[float], acts: Sequence[bool]) -> tuple[float, ...]:
        """Return the weights for a module that only some adapters change; the others get weight 0.

        With `fill` "one", a positive weight becomes 1 if no other adapter changes the module. A weight of 0 stays,
        since it leaves the adapter out on purpose, and a negative one stays, since 1 would undo the negation.
        """
        result = [weight if act else 0.0 for weight, act in zip(weights, acts, strict=True)]
        alone = [index for index, act in enumerate(acts) if act]
        if self.fill == "one" and len(alone) == 1 and result[alone[0]] > 0:
            result[alone[0]] = 1.0
        return tuple(result)

    def _keepers(self) -> tuple[list[AdapterSource], list[float]]:
        """Return the adapters whose fully trained tensors are merged, with their weights."""
        pairs = list(zip(self.sources, self.weights, strict=True))
        if not self.keep_heads:
            pairs = [pair for pair in pairs if pair[1] != 0] or pairs
        return [source for source, _ in pairs], [weight for _, weight in pairs]

    def has_part(self, acting: Sequence[bool]) -> tuple[bool, ...]:
        """Return whether each adapter contributes to the result: by an update or by fully trained tensors.

        Args:
            acting: Whether each has a weight other than 0 in some module.
        """
        kept, _ = self._keepers()
        return tuple(
            acts or bool(source.saved_headers and source in kept)
            for source, acts in zip(self.sources, acting, strict=True)
        )

    def merged_saved(self) -> dict[str, Tensor]:
        """Return the fully trained tensors of the result; see `whole_tensors.merge_saved`."""
        sources, weights = self._keepers()
        _check_head_kinds(sources)
        if self.saved == AVERAGE:
            _check_same_heads(sources)
        return merge_saved(sources, weights, self.saved, modules=self.modules)

    def notes(self) -> tuple[str, ...]:
        """Return remarks for the user about the result."""
        sources, _ = self._keepers()
        apart: tuple[str, ...] = ()
        if len(self.sources) > 1 and not any(sum(m in s.modules for s in self.sources) > 1 for m in self.modules):
            apart = ("warning: no module is changed by two adapters: the weights only scale each adapter alone.",)
        apart += tuple(
            f"modules of '{source.name}' get the paths of the vision-language class, so load the merge with that class."
            for source in self.sources
            if source.was_moved and len(source.meta.targets.modules) > len(source.modules)
        )
        apart += self._coarse_statistics()
        if self.saved == AVERAGE and sum(bool(source.saved_headers) for source in sources) > 1:
            return (*apart, "fully trained tensors are averaged by the size of the weights.")
        apart += tuple(
            f"the fully trained tensors of '{source.name}' are left out, since its weight is 0."
            for source in self.sources
            if source.saved_headers and source not in sources
        )
        names = [source.name for source in sources]
        chosen = resolve_policy(names, self.saved)
        # PEFT also stores the frozen weight under a LoRA, which is not a trained tensor.
        keys_of = [
            {key for key in source.saved_headers if not key.endswith(".base_layer.weight")} for source in sources
        ]
        first = keys_of[chosen] if isinstance(chosen, int) else set()
        trained = [
            (name, len(keys if keys is first else keys - first)) for name, keys in zip(names, keys_of, strict=True)
        ]
        return apart + tuple(
            f"{count} fully trained tensors of '{name}' replace those of the base model; weights do not apply to them."
            for name, count in trained
            if count
        )

    def _coarse_statistics(self) -> tuple[str, ...]:
        """Return a warning if statistics that must be inverted are stored in 16 bits."""
        files = {header.file for file in self.statistics for header in file.tensors.values() if header.dtype in HALF}
        if self.method.statistics != "in in" or not files:
            return ()
        return (
            f"warning: the statistics in {', '.join(sorted(files))} are stored in 16 bits. Rounding removes directions "
            "with few inputs, and these directions get the weighted mean. Store the statistics in float32.",
        )

    def meta(self) -> AdapterMeta:
        """Return the metadata of the merged adapter."""
        metas = [source.meta for source in self.sources]
        first = metas[0]
        keepers, _ = self._keepers()
        meta = AdapterMeta(
            base=first.base,
            revision=first.revision,
            # PEFT builds the head of a task type, so the result must not have the task type of a head that is left out.
            task_type=_task_type([source.meta for source in keepers]),
            targets=self._targets(),
            fan_in_fan_out=first.fan_in_fan_out,
            **merge_extras([source.name for source in keepers], [source.meta for source in keepers]),
        )
        return meta if self.sum_kind is None else self.sum_kind.describe(meta)

    def _targets(self) -> TargetSpec:
        """Return the targets of an adapter that covers every module; if there is no such adapter, list full paths."""
        modules = self.modules
        listed = {path for source in self.sources if source.was_moved for path in source.meta.targets.modules}
        for source in self.sources:
            if not listed and len(source.modules) == len(modules):
                return source.meta.targets
        return TargetSpec(modules=tuple(sorted({*modules, *listed})))


def check(sources: Sequence[AdapterSource], *, allow_base_mismatch: bool = False) -> None:
    """Refuse adapters that cannot be merged with each other. Only their headers are read.

    Raises:
        IncompatibleAdapters: an adapter fuses its input with a source text, or the adapters differ in their base model
            (unless allowed), in the shape of a module, or in the layout of the weights.
    """
    for source in sources:
        if source.meta.fusion:
            raise IncompatibleAdapters(
                f"adapter '{source.name}' fuses its input with a source text. It is not a change of weights, so it "
                "cannot be merged. Evaluate it with --source, or merge the adapters that it was made from.",
                code="adapters.fusion",
            )
    # Compare every pair: an adapter that records less than the others may match two that differ.
    for one, other in combinations(sources, 2):
        if not allow_base_mismatch:
            _check_base(one, other)
        if one.meta.fan_in_fan_out != other.meta.fan_in_fan_out:
            raise IncompatibleAdapters(
                f"adapters '{one.name}' and '{other.name}' must agree on fan_in_fan_out, and do not.",
                code="adapters.fan-in-fan-out",
            )
    _check_modules(sources)
    _check_roots(sources)


def _check_roots(sources: Sequence[AdapterSource]) -> None:
    """Refuse adapters of different classes of the base model: PEFT would load only some of their modules."""
    clash = two_roots(module for source in sources for module in source.modules)
    if clash is not None:
        owners = [next(source.name for source in sources if module in source.modules) for module in clash]
        raise IncompatibleAdapters(
            f"all modules must belong to one model class, and '{clash[0]}' (of '{owners[0]}') and '{clash[1]}' (of "
            f"'{owners[1]}') belong to two. Save the adapters from one class of the base model.",
            code="adapters.model-classes",
        )


def _check_modules(sources: Sequence[AdapterSource]) -> None:
    seen: dict[str, tuple[str, ModuleHeader]] = {}
    for source in sources:
        for module, header in source.modules.items():
            name, first = seen.setdefault(module, (source.name, header))
            if not first.fits(header):
                raise IncompatibleAdapters(
                    f"module '{module}': update shapes must be equal, found '{name}' [{first.out} {first.into}] and "
                    f"'{source.name}' [{header.out} {header.into}]. The adapters belong to different base models.",
                    code="adapters.shapes",
                )
            if first.layout != header.layout:
                raise IncompatibleAdapters(
                    f"module '{module}' must be of one kind in all adapters, found {first.layout} in '{name}' and "
                    f"{header.layout} in '{source.name}'. The adapters belong to different base models.",
                    code="adapters.kinds",
                )


def _check_base(one: AdapterSource, other: AdapterSource) -> None:
    marks = one.meta.base_fingerprint, other.meta.base_fingerprint
    same = marks[0] == marks[1] if None not in marks else _base_key(one) == _base_key(other)
    if not same:
        raise IncompatibleAdapters(
            f"adapters '{one.name}' and '{other.name}' must come from one base model, found {_base(one)} and "
            f"{_base(other)}. If the two are the same model under two names, pass --allow-base-mismatch.",
            code="adapters.bases",
        )


def _base_key(source: AdapterSource) -> tuple[str | None, str | None]:
    """Return a key that is equal for all spellings of a base model: Hub id, folder in the Hub cache, local folder."""
    name, revision = source.meta.base, source.meta.revision
    if name is None:
        return None, revision
    cached = _CACHED.search(name)
    if cached is not None:
        name = f"{cached['owner']}/{cached['name']}"
    elif Path(name).is_dir():
        return str(Path(name).resolve()), revision
    return name.rstrip("/").casefold(), None if revision == "main" else revision


def _base(source: AdapterSource) -> str:
    if source.meta.base is None:
        return "no base model"
    revision = f"@{source.meta.revision}" if source.meta.revision else ""
    return f"'{source.meta.base}{revision}'"


def _check_head_kinds(sources: Sequence[AdapterSource]) -> None:
    """Refuse heads of different kinds, since a model has one head."""
    saving = [source for source in sources if source.saved_headers]
    heads = [(source, form) for source in saving if len(saving) > 1 and (form := form_of_head(source))]
    for source, form in heads[1:]:
        if form is not heads[0][1]:
            raise IncompatibleAdapters(
                f"a merged adapter has one head, but '{heads[0][0].name}' has {heads[0][1].title} and "
                f"'{source.name}' has {form.title}. Leave out one of the two adapters.",
                code="adapters.heads",
            )


def _settings_of(task: object, prefix: str = "") -> dict[str, object]:
    """Return the entries of a manifest's `task` by their paths, such as `reader.layers`."""
    if not isinstance(task, Mapping):
        return {}
    entries: dict[str, object] = {}
    for name, value in task.items():
        path = f"{prefix}{name}"
        entries |= _settings_of(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return entries


def _check_same_heads(sources: Sequence[AdapterSource]) -> None:
    """Refuse an average of heads that have different outputs or read different states."""
    heads = [source for source in sources if source.meta.saved_modules]
    tasks = [source.meta.manifest.get("task") for source in heads]
    for source, task in zip(heads, tasks, strict=True):
        if task != tasks[0]:
            one, other = map(_settings_of, (tasks[0], task))
            unequal = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
            listed = ", ".join(f"{name} ({one.get(name)} and {other.get(name)})" for name in unequal)
            raise IncompatibleAdapters(
                f"heads can be averaged only if their task, labels and reader are the same, and those of "
                f"'{heads[0].name}' and '{source.name}' differ in {listed}. Keep one head: --saved NAME.",
                code="adapters.head-labels",
            )


def _task_type(metas: Sequence[AdapterMeta]) -> str | None:
    """Return the task type of an adapter with a trained head, which PEFT must load; without a head the first type."""
    types = [meta.task_type for meta in sorted(metas, key=lambda meta: not meta.saved_modules)]
    return next((name for name in types if name), None)
