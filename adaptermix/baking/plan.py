"""The plan of a bake, made from headers only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..adapters.base_weights import find_weight, without_copies
from ..algebra import Dense, Update
from ..checkpoints.reading import FLOATS
from ..checkpoints.writing import DTYPES, companions, parse_size
from ..errors import ModelError, PlanError
from ..io.checkpoint_files import Checkpoint, config_of
from ..io.files import check_not_input, check_output
from ..io.fingerprints import fingerprint
from ..io.json_types import JsonObject
from ..merging.base_tensors import as_weight, is_transposed, untied, weight_names, weight_shape
from ..merging.execute import merge_module
from ..merging.merge_adapters import check_trained_on, make_plan
from ..merging.merge_options import MergeOptions
from ..merging.plan import MergePlan
from ..models.devices import pick_device
from ..models.formats import FORMATS, Format, Quantized
from ..models.formats.checkpoint import DequantizedCheckpoint, QuantizedCheckpoint, as_whole
from ..models.quantization import identity, is_skipped, skipped_modules
from ..options import BakeSettings
from ..training.dry_run import outline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE = ("merge-16", "dequant-16")
"""Strategies with a 16-bit result."""
_HEADS = ("classifier", "score", "qa_outputs", "cls", "lm_head")
"""Names of the heads that transformers adds for tasks; a new head must not be quantised."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BakePlan:
    """The plan of a bake.

    Args:
        settings: The request.
        merge: The sum of the adapters.
        checkpoint: The base model.
        device: Device of the computation.
        names: Module of the adapters, by the name of the weight.
        paths: Path in the model of every linear layer, by the name of its weight.
        linear: Names of the weights that a quantised base stores quantised.
        skipped: Modules that it does not quantise.
        unfit: Paths of linear layers that the format cannot hold, so that they stay in 16 bits.
        transposed: Names of weights stored as [in out], though quantised ones are [out in].
        rounded_from: Dtype of weights before they are quantised, as in the training of the adapters; None for the
            storage dtype.
    """

    settings: BakeSettings
    merge: MergePlan
    checkpoint: Checkpoint
    device: torch.device
    names: Mapping[str, str]
    paths: Mapping[str, str]
    linear: frozenset[str]
    skipped: tuple[str, ...]
    unfit: tuple[str, ...]
    transposed: frozenset[str]
    rounded_from: torch.dtype | None

    @property
    def strategy(self) -> str:
        """The strategy in use: merge-16 if `auto` has no 4-bit weights."""
        if self.settings.strategy == "auto" and self.settings.quantize == "none":
            return "merge-16"
        return self.settings.strategy

    def quantiser(self) -> JsonObject | None:
        """Return the manifest entry of the quantiser of the result or, in 16 bits, of the quantised base."""
        if not isinstance(self.checkpoint, QuantizedCheckpoint) or not self.checkpoint.readers:
            return identity(self.settings.quantize)
        return next(iter(self.checkpoint.readers.values()))().identity()

    @property
    def is_quantized_base(self) -> bool:
        """Whether the base is in the format of the result, so that its codes are kept where possible."""
        return isinstance(self.checkpoint, QuantizedCheckpoint)

    @property
    def format(self) -> Format | None:
        """The format of the result; None in 16 bits."""
        return None if self.settings.quantize == "none" else FORMATS[self.settings.quantize]

    def pass_dtype(self) -> str:
        """Return the dtype to load the base in, so that its codes equal those of this bake."""
        if self.rounded_from is None:
            name = next(iter(self.linear))
            return str(self.dtype_of(name, self.checkpoint.load(name).dtype)).removeprefix("torch.")
        return str(self.rounded_from).removeprefix("torch.")

    def update(self, name: str) -> Update:
        """Return the sum of the adapters' updates of a weight, on the CPU; for a DoRA it depends on the weight."""
        merged, _ = merge_module(self.merge, self.names[name], device=self.device)
        if isinstance(merged, Dense):
            return merged
        kind = self.merge.sum_kind
        return merged.update if kind is None else kind.delta(merged, partial(self._weight, name))

    def _weight(self, name: str) -> Tensor:
        """Return the weight [out in] that the delta is computed for: of the codes if these are written."""
        if name in self.linear and self.strategy != "merge-16":
            return self.quantized(name).weight().cpu()
        stored = self.checkpoint.load(name).float()
        return stored.T if self.is_transposed(name) else stored

    def quantized(self, name: str) -> Quantized:
        """Return a weight of the base in quantised form: read from a quantised base, else rounded."""
        if isinstance(self.checkpoint, QuantizedCheckpoint) and name in self.checkpoint.readers:
            return self.checkpoint.readers[name]().to(self.device)
        tensor = self.checkpoint.load(name).to(self.device)
        tensor = tensor.T if name in self.transposed else tensor
        return FORMATS[self.settings.quantize](tensor.to(self.rounded_from or self.dtype_of(name, tensor.dtype)))

    def delta(self, name: str, update: Update) -> Tensor:
        """Return an update in the base's layout, in float32, on the device of the computation."""
        shape = self.checkpoint.tensors[name].shape
        return as_weight(update.dense(), shape, transposed=self.is_transposed(name)).float().to(self.device)

    def is_transposed(self, name: str) -> bool:
        """Whether the base stores a weight as [in out]."""
        return is_transposed(self.merge, self.names[name])

    @property
    def requested_dtype(self) -> torch.dtype | None:
        """Requested storage dtype of float tensors that are not quantised, if any."""
        return DTYPES[self.settings.dtype] if self.settings.dtype else None

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the storage dtype of a tensor that is not quantised and has this dtype in the base."""
        is_float = self.checkpoint.tensors[name].dtype in FLOATS
        return self.requested_dtype or dtype if is_float else dtype

    def bias_of(self, name: str) -> str | None:
        """Return the name of a weight's bias, if there is one."""
        bias = f"{name.removesuffix('weight')}bias"
        return bias if bias in self.checkpoint.tensors else None


def prepare(settings: BakeSettings) -> BakePlan:
    """Plan a bake from headers only.

    Raises:
        AdapterMixError: adapters and base do not match, or the output cannot be written.
    """
    out = Path(settings.out)
    if not settings.dry_run:
        check_output(out, overwrite=settings.overwrite)
        check_not_input(out, [settings.base, *settings.adapter])
    parse_size(settings.shard_size)
    options = MergeOptions(
        adapters=settings.adapter,
        weights=[1.0] * len(settings.adapter),
        base=settings.base,
        allow_base_mismatch=settings.allow_base_mismatch,
    )
    merge = make_plan(options)
    if merge.checkpoint is None:
        raise PlanError("bake needs a base model. Pass --base MODEL.", code="base.needed")
    checkpoint = as_whole(merge.checkpoint)
    # a quantised base has other files
    if not settings.allow_base_mismatch and not isinstance(checkpoint, DequantizedCheckpoint):
        check_trained_on(merge.sources, fingerprint(checkpoint.path), settings.base)
    checkpoint = untied(checkpoint, merge)
    sources = tuple(without_copies(source, checkpoint) for source in merge.sources)
    merge = replace(merge, checkpoint=checkpoint, sources=sources)
    if settings.without_heads:
        merge = replace(merge, sources=tuple(replace(source, saved_headers={}) for source in merge.sources))
    _check_bakeable(merge)
    _check_format(settings, checkpoint)
    companions(checkpoint.path)
    names = weight_names(merge, checkpoint)
    _check_shapes(merge, checkpoint, names)
    layers = _layers(settings, checkpoint)
    return BakePlan(
        settings=settings,
        merge=merge,
        checkpoint=checkpoint,
        device=pick_device(settings.device),
        names=names,
        paths=layers.paths,
        linear=frozenset(layers.linear if settings.quantize != "none" else ()),
        skipped=tuple(layers.skipped),
        unfit=tuple(layers.unfit),
        transposed=frozenset(layers.transposed),
        rounded_from=None if settings.dtype else _trained_in(merge, settings.quantize),
    )


def _check_bakeable(merge: MergePlan) -> None:
    for source in merge.sources:
        if source.saved_headers or any(header.bias for header in source.modules.values()):
            raise PlanError(
                f"adapter '{source.name}' has biases or fully trained tensors (a head), which cannot be baked. Load it "
                "with PEFT on the base model, or pass --without-heads for a base that further adapters are trained "
                "on.",
                code="bake.not-deltas",
            )


def _trained_in(merge: MergePlan, quantize: str) -> torch.dtype | None:
    """Return the dtype from which the base was quantised when the adapters were trained, if they record one."""
    for source in merge.sources:
        entry = source.meta.manifest.get("base")
        quantiser = entry.get("quantization") if isinstance(entry, Mapping) else None
        if isinstance(entry, Mapping) and isinstance(quantiser, Mapping) and quantiser.get("format") == quantize:
            return DTYPES.get(str(entry.get("dtype")))
    return None


def _check_format(settings: BakeSettings, checkpoint: Checkpoint) -> None:
    """Refuse a quantised base that the settings do not match."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return
    if settings.quantize != checkpoint.format:
        raise PlanError(
            f"the base model {checkpoint.path} is in {checkpoint.format}, and --quantize says {settings.quantize}. "
            f"Pass --quantize {checkpoint.format}, with --strategy dequant-16 for a result in 16 bits.",
            code="bake.format",
        )
    if settings.strategy == "merge-16":
        raise PlanError(
            f"--strategy merge-16 adds to the weights before rounding, and the base model {checkpoint.path} is in "
            f"{checkpoint.format}. Give the model that it was made from, or use --strategy dequant-16.",
            code="bake.merge-16",
        )


def _check_shapes(merge: MergePlan, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    for name, module in names.items():
        shape, expected = checkpoint.tensors[name].shape, weight_shape(merge, module)
        if -1 not in expected and tuple(expected) != tuple(shape):
            raise ModelError(
                f"the base's weight '{name}' must be {list(expected)}, as in the adapters, and is {list(shape)}. Give "
                "the base model that the adapters were trained on.",
                code="base.weight-shape",
            )


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """The linear layers of a base; the fields are those of `BakePlan`."""

    paths: Mapping[str, str] = field(default_factory=dict)
    linear: Collection[str] = ()
    skipped: Sequence[str] = ()
    unfit: Sequence[str] = ()
    transposed: Collection[str] = ()


def _layers(settings: BakeSettings, checkpoint: Checkpoint) -> _Layers:
    """Find the linear layers of a base, and those of them that are quantised.

    Raises:
        ModelError: none can be in the format of the result.
    """
    if settings.quantize == "none" and not settings.calibration:
        return _Layers()
    model: PreTrainedModel = outline(settings.base)
    head = model.get_output_embeddings() if hasattr(model, "lm_head") or "CausalLM" in type(model).__name__ else None
    left = skipped_modules(None if head is not None else ())
    paths: dict[str, str] = {}
    kinds: dict[str, str] = {}
    whole: list[str] = []
    for path, module in model.named_modules():
        if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
            continue
        if module is head or is_skipped(path, left):
            whole.append(path)
            continue
        try:
            name = find_weight(checkpoint, path)
        except ModelError:  # the head is new when the model is loaded, so it is not written
            continue
        paths[name], kinds[name] = path, type(module).__name__
    transposed = {name for name, kind in kinds.items() if kind != "Linear"}
    if isinstance(checkpoint, QuantizedCheckpoint):
        return _quantized_layers(checkpoint, FORMATS[settings.quantize], paths, whole, transposed)
    fitting = set(paths) if settings.quantize == "none" else _fitting(settings.quantize, checkpoint, kinds)
    unfit = [path for name, path in paths.items() if name not in fitting]
    if paths and not fitting:
        raise ModelError(
            f"{settings.quantize} is for {FORMATS[settings.quantize].reach}, and no layer of {checkpoint.path} is one "
            f"(the first is '{unfit[0]}'). Use another --quantize.",
            code="bake.no-fitting-layer",
        )
    known = {name.removesuffix(".weight") for name in paths}
    others = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")]
    others_2d = [name for name in others if name not in known and len(checkpoint.tensors[f"{name}.weight"].shape) == 2]
    skipped = list(dict.fromkeys([*whole, *left, *unfit, *others_2d, *_HEADS]))
    return _Layers(paths=paths, linear=fitting, skipped=skipped, unfit=unfit, transposed=transposed)


def _fitting(quantize: str, checkpoint: Checkpoint, kinds: Mapping[str, str]) -> set[str]:
    """Return the names of the weights that can be in a format, of modules of these kinds.

    Raises:
        ModelError: the model has experts, and the format does not hold them.
    """
    form = FORMATS[quantize]
    expert = next((name for name in checkpoint.tensors if ".experts." in name), None)
    if expert and not form.has_experts:
        raise ModelError(
            f"{quantize} is not for models with a mixture of experts, and {checkpoint.path} has '{expert}'. Use "
            "another --quantize.",
            code="bake.experts",
        )
    # A Conv1D stores [in out].
    shapes = {
        name: shape if kinds[name] == "Linear" else shape[::-1]
        for name in kinds
        if len(shape := checkpoint.tensors[name].shape) == 2
    }
    return {name for name, shape in shapes.items() if kinds[name] in form.modules and form.fits(shape)}


def _quantized_layers(
    checkpoint: QuantizedCheckpoint, form: Format, paths: Mapping[str, str], whole: Sequence[str], transposed: set[str]
) -> _Layers:
    """Return the layers of a base in the format of the result."""
    if transposed:
        raise ModelError(
            f"the base model {checkpoint.path} has quantised Conv1D layers, which are not supported. Give the "
            "model that it was made from.",
            code="bake.conv1d",
        )
    listed = config_of(checkpoint)["quantization_config"].get(form.skip_key)
    others = [*whole, *(path for name, path in paths.items() if name not in checkpoint.readers)]
    return _Layers(paths=paths, linear=set(checkpoint.readers), skipped=listed or others)
