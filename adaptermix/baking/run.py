"""`bake`: adapters written into their base model, and what is left of them there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import manifest
from ..adapters.convert import find_weight
from ..algebra import LowRank, Update
from ..checkpointing.adapters import weight_names
from ..checkpointing.reading import FLOATS
from ..checkpointing.writing import DTYPES, copy_companions, parse_size, plan_shards, write_checkpoint
from ..checkpoints import Checkpoint
from ..compose.dense import as_weight, check_dense, is_turned
from ..compose.execute import merge_module
from ..compose.merging import make_plan, merge
from ..compose.plan import MergePlan
from ..errors import ModelError, PlanError
from ..evaluation.acting import acting
from ..files import check_not_input, check_output, whole_folder
from ..models import fingerprint, load_base, model_kind, pick_device
from ..progress import SILENT, Watcher
from ..publish.card import card
from ..quantization import identity, skipped_modules
from ..settings import BakeSettings
from ..train.outline import outline
from .activations import known_inputs, read_texts
from .fidelity import Fidelity, fidelity
from .grid import FourBit, quantize, stored
from .report import BakedModule, BakeReport
from .strategies import STRATEGIES, Baked, Known
from .writing import bytes_of, write_shards

_WHOLE = ("merge-16", "dequant-16")
"""Strategies whose result is in 16 bits."""
_SAMPLED = 64
"""Rows of a weight whose rounding to 16 bits is measured."""
_CHEAPEST = ("requantize", "calibrated")
"""What `auto` tries, in turn, before it leaves a module in 16 bits."""


@dataclass(kw_only=True)
class _Bake:
    """A bake that is decided."""

    settings: BakeSettings
    plan: MergePlan
    checkpoint: Checkpoint
    device: torch.device
    names: Mapping[str, str]
    """Module of the adapters, by the name of the weight."""
    linear: frozenset[str]
    """Names of the weights that a base in 4 bits has in 4 bits."""
    skipped: tuple[str, ...]
    """Modules that it leaves whole."""
    paths: Mapping[str, str]
    """Module path in the model, by the name of the weight."""
    known: dict[str, Known] = field(default_factory=dict)
    modules: dict[str, BakedModule] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    """Paths of modules that stay in 16 bits."""
    shifts: dict[str, Tensor] = field(default_factory=dict)
    """What is added to biases."""

    @property
    def strategy(self) -> str:
        if self.settings.strategy != "auto":
            return self.settings.strategy
        return "merge-16" if self.settings.quantize == "none" else "auto"

    def delta(self, name: str) -> Tensor:
        """Return the adapters' delta of a weight, as the base stores it, in float32."""
        shape = self.checkpoint.tensors[name].shape
        return as_weight(self.update(name).dense(), shape, turned=self.is_turned(name)).float()

    def update(self, name: str) -> Update:
        """Return the sum of the adapters' updates of a weight."""
        return merge_module(self.plan, self.names[name], device=self.device).update

    def is_turned(self, name: str) -> bool:
        """Whether the base stores a weight as [in out]."""
        return is_turned(self.plan, self.names[name])

    def dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """Return the storage dtype of a tensor that is not in 4 bits."""
        is_float = self.checkpoint.tensors[name].dtype in FLOATS
        return DTYPES[self.settings.dtype] if self.settings.dtype and is_float else tensor.dtype

    def deltas(self) -> dict[str, Callable[[], Tensor | LowRank]]:
        """Return what makes the delta of each tensor of a result in 16 bits."""
        changed = sorted(set(self.names) | (self.linear if self.strategy == "dequant-16" else set()))
        return {name: partial(self._delta_whole, name) for name in changed}

    def _delta_whole(self, name: str) -> Tensor | LowRank:
        """Return what is added to a tensor: from its own values to those of its 4 bits, if meant, and the delta."""
        tensor = self.checkpoint.load(name)
        moved = None
        if self.strategy == "dequant-16" and name in self.linear:
            before = tensor.float().to(self.device)
            moved = quantize(before, kind=self.settings.quantize).weight() - before
            if name not in self.names:
                return moved
        update = self.update(name)
        shape = self.checkpoint.tensors[name].shape
        rows = torch.linspace(0, shape[0] - 1, min(shape[0], _SAMPLED)).round().long()
        if isinstance(update, LowRank) and not self.is_turned(name) and len(shape) == 2:
            delta: Tensor | LowRank = update
            some = (update.b[rows.to(update.b.device)] * update.scale @ update.a).float()
        else:
            delta = self.delta(name)
            some = delta[rows.to(delta.device)]
        start = tensor[rows].float().to(some.device)
        start = start if moved is None else start + moved[rows.to(moved.device)]
        kept = (start + some).to(self.dtype_of(name, tensor)).float() - start
        self._report(name, self.strategy, _rounded(some, kept, self.known.pop(name, None)))
        return delta if moved is None else moved + self.delta(name)

    def groups(self, watch: Watcher) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of a result in 4 bits; biases come after the weights of their modules."""
        biases = {f"{name.removesuffix('weight')}bias" for name in self.names}
        order = sorted(self.checkpoint.tensors, key=lambda name: (name in biases, name))
        with watch.track("bake", len(order)) as advance:
            for name in order:
                tensor = self.checkpoint.load(name)
                if name in self.linear:
                    yield self._in_four_bits(name, tensor)
                else:
                    shift = self.shifts.get(name)
                    found = tensor if shift is None else tensor.float() + shift.cpu()
                    yield {name: found.to(self.dtype_of(name, tensor))}
                advance(1, name)

    def _in_four_bits(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        base = quantize(tensor.float().to(self.device), kind=self.settings.quantize)
        base.state.dtype = self.dtype_of(name, tensor)
        if name not in self.names:
            return {key: value.cpu() for key, value in stored(name, base).items()}
        delta, known = self.delta(name), self.known.pop(name, None)
        chosen, baked = self._baked(base, delta, known, has_bias=self._bias(name) is not None)
        if baked is None:
            self.whole.append(self.paths[name])
            result = (base.weight() + delta).to(self.dtype_of(name, tensor))
            self._report(name, "dequant-16", _rounded(delta, result.float() - base.weight(), known))
            return {name: result.cpu()}
        self._report(name, chosen, baked.fidelity)
        if baked.shift is not None:
            self.shifts[str(self._bias(name))] = baked.shift
        return {key: value.cpu() for key, value in stored(name, baked.weight).items()}

    def _baked(self, base: FourBit, delta: Tensor, known: Known | None, *, has_bias: bool) -> tuple[str, Baked | None]:
        """Return what a strategy gives; with `auto` that of the first that keeps enough, None if none does."""
        if self.strategy != "auto":
            return self.strategy, STRATEGIES[self.strategy](base, delta, known, has_bias)
        for name in _CHEAPEST:
            found = STRATEGIES[name](base, delta, known, has_bias)
            if found.fidelity.kept >= self.settings.keep_at_least:
                return name, found
        return "dequant-16", None

    def _bias(self, name: str) -> str | None:
        bias = f"{name.removesuffix('weight')}bias"
        return bias if bias in self.checkpoint.tensors else None

    def _report(self, name: str, strategy: str, found: Fidelity) -> None:
        self.modules[self.names[name]] = BakedModule(strategy=strategy, fidelity=found)

    def report(self, size: int, out: Path | None) -> BakeReport:
        return BakeReport(
            strategy=self.strategy,
            modules=dict(sorted(self.modules.items())),
            bytes=size,
            measured_on="held-out texts" if self.settings.calibration else "weights",
            out=out,
        )


def _rounded(delta: Tensor, realised: Tensor, known: Known | None) -> Fidelity:
    return fidelity(delta, realised, known.held_moment if known else None)


def _linear(reference: str, checkpoint: Checkpoint) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the paths of the modules that bitsandbytes quantises, by weight name, and what it leaves whole."""
    model: Any = outline(reference)
    kind = model_kind(reference)
    head = model.get_output_embeddings() if kind == "causal" else None
    left = skipped_modules(() if kind == "encoder" else None)
    found = {}
    named = [(path, module) for path, module in model.named_modules() if type(module) is nn.Linear]
    for path, module in named:
        if module is not head and not any(path == name or path.startswith(f"{name}.") for name in left):
            found[find_weight(checkpoint, path)] = path
    whole = [path for path, module in named if module is head]
    return found, (*whole, *left)


def prepare(settings: BakeSettings) -> _Bake:
    """Decide a bake from headers alone.

    Raises:
        AdapterMixError: adapters and base do not fit, or the output cannot be written.
    """
    out = Path(settings.out)
    if not settings.dry_run:
        check_output(out, overwrite=settings.overwrite)
        check_not_input(out, [settings.base, *settings.adapter])
    parse_size(settings.shard_size)
    plan = make_plan(
        settings.adapter,
        weights=[1.0] * len(settings.adapter),
        base=settings.base,
        allow_base_mismatch=settings.allow_base_mismatch,
    )
    check_dense(plan)
    if plan.checkpoint is None:
        raise PlanError("a base model is needed to bake into, and none is given. Pass --base MODEL.")
    names = weight_names(plan, plan.checkpoint)
    linear: dict[str, str] = {}
    skipped: tuple[str, ...] = ()
    if settings.quantize != "none":
        _check_whole(plan.checkpoint)
        linear, skipped = _linear(settings.base, plan.checkpoint)
        beyond = sorted(set(names) - set(linear))
        if beyond and settings.strategy not in _WHOLE:
            raise PlanError(
                f"in 4 bits are linear layers, and the adapter acts on '{names[beyond[0]]}', which is none or stays "
                "whole. Take --strategy merge-16 or dequant-16."
            )
    return _Bake(
        settings=settings,
        plan=plan,
        checkpoint=plan.checkpoint,
        device=pick_device(settings.device),
        names=names,
        linear=frozenset(linear),
        skipped=skipped,
        paths=linear,
    )


def _check_whole(checkpoint: Checkpoint) -> None:
    if any(".quant_state." in name for name in checkpoint.tensors):
        raise ModelError(
            f"the base model must be in 16 or 32 bits, and {checkpoint.path} is in 4 bits already. Give the model that "
            "it was made from; --quantize rounds it as bitsandbytes does."
        )


def _calibrate(bake: _Bake, watch: Watcher) -> None:
    """Let the model with the adapters read the texts, and keep what is known of the inputs of each module."""
    settings = bake.settings
    texts = read_texts(settings.calibration)
    base = load_base(settings.base, device=settings.device, dtype="auto")
    paths = bake.paths or bake.names
    with ExitStack() as stack:
        stack.enter_context(acting(base, bake.plan.sources, heads=False))
        wanted = {name: paths[name] for name in bake.names}
        bake.known.update(known_inputs(base, texts, wanted, watch))


def bake(settings: BakeSettings, *, watch: Watcher = SILENT) -> BakeReport:
    """Write adapters into their base model, one tensor at a time, and measure what is left of them.

    The sum of the adapters' deltas is added in float32 and rounded once. In 4 bits (`--quantize`) the base is rounded
    as bitsandbytes does, and the delta is written as the strategy says; the result loads with transformers and
    bitsandbytes alone.

    Raises:
        AdapterMixError: adapters and base do not fit, too little of the adapter would be kept, or the output cannot
            be written.
    """
    if settings.strategy == "keep":
        return _kept_apart(settings, watch)
    found = prepare(settings)
    if settings.calibration:
        _calibrate(found, watch)
    out = Path(settings.out)
    if settings.dry_run:
        return found.report(_tried(found, watch), None)
    with whole_folder(out, overwrite=settings.overwrite) as folder:
        report = found.report(_written(found, folder, watch), out)
        _check_kept(report, found)
        document = _document(found, report)
        manifest.write(folder, document)
        (folder / "README.md").write_text(card(document, name=out.name), encoding="utf-8")
    return report


def _kept_apart(settings: BakeSettings, watch: Watcher) -> BakeReport:
    """Write the sum of the adapters as one LoRA: the base's codes stay, and nothing is lost."""
    merged = merge(
        settings.adapter,
        weights=[1.0] * len(settings.adapter),
        out=settings.out,
        overwrite=settings.overwrite,
        dry_run=settings.dry_run,
        allow_base_mismatch=settings.allow_base_mismatch,
        watch=watch,
    )
    whole = Fidelity(kept=1.0, error=0.0, codes_changed=0.0, size=1.0)
    modules = {path: BakedModule(strategy="keep", fidelity=whole) for path in merged.modules}
    plan = make_plan(settings.adapter, weights=[1.0] * len(settings.adapter), allow_base_mismatch=True)
    sizes = [
        4 * source.modules[path].rank * (source.modules[path].out + source.modules[path].into)
        for source in plan.sources
        for path in source.modules
    ]
    out = None if settings.dry_run else Path(settings.out)
    return BakeReport(strategy="keep", modules=modules, bytes=sum(sizes), measured_on="weights", out=out)


def _written(found: _Bake, folder: Path, watch: Watcher) -> int:
    """Write the checkpoint with its config and tokenizer; return the bytes of its tensors."""
    settings = found.settings
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    if found.strategy in _WHOLE:
        options: dict[str, Any] = {"dtype": dtype, "shard_size": settings.shard_size}
        write_checkpoint(found.checkpoint, folder, found.deltas(), watch=watch, **options)
        return _size(found, dtype)
    size = write_shards(folder, found.groups(watch), limit=parse_size(settings.shard_size))
    copy_companions(found.checkpoint, folder, dtype=dtype)
    _name_quantiser(folder, found)
    return size


def _tried(found: _Bake, watch: Watcher) -> int:
    """Do all but write; return the bytes that there would be."""
    if found.strategy not in _WHOLE:
        return sum(map(bytes_of, found.groups(watch)))
    makers = found.deltas()
    with watch.track("bake", len(makers)) as advance:
        for name, make in makers.items():
            make()
            advance(1, name)
    return _size(found, DTYPES[found.settings.dtype] if found.settings.dtype else None)


def _size(found: _Bake, dtype: torch.dtype | None) -> int:
    shards = plan_shards(found.checkpoint, dtype=dtype, shard_size=found.settings.shard_size)
    return sum(kind.itemsize * math.prod(shape) for shard in shards for kind, shape in shard.headers.values())


def _check_kept(report: BakeReport, found: _Bake) -> None:
    """Refuse a result that has lost the adapter."""
    least, kept = found.settings.keep_at_least, report.overall.kept
    if kept >= least or least == 0:
        return
    sizes = sum(header.size for header in found.checkpoint.tensors.values())
    raise PlanError(
        f"at least {least:g} of the adapter's effect must be kept, and strategy '{report.strategy}' keeps {kept:.3f} "
        f"(on {report.measured_on}). --strategy auto leaves in 16 bits what 4 bits cannot hold; merge-16 and "
        f"dequant-16 keep all of it in {sizes / 1e9:.2f} GB instead of {report.bytes / 1e9:.2f}; --keep-at-least "
        f"{max(0, kept - 0.01):.2f} takes it as it is."
    )


def _name_quantiser(folder: Path, found: _Bake) -> None:
    """Let the config say what is in 4 bits, as transformers writes it."""
    from transformers import BitsAndBytesConfig

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    named = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=found.settings.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*found.skipped, *sorted(found.whole)],
    )
    config["quantization_config"] = named.to_dict()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _document(found: _Bake, report: BakeReport) -> dict[str, Any]:
    settings, sources = found.settings, found.plan.sources
    base = manifest.base_entry([source.meta for source in sources])
    base["fingerprint"] = base["fingerprint"] or fingerprint(found.checkpoint.path)
    return manifest.manifest(
        "bake",
        artifact="checkpoint",
        plan=settings.model_dump(mode="json", exclude={"out", "overwrite", "dry_run", "device"}),
        base=base,
        inputs=[manifest.input_entry(source, 1.0) for source in sources],
        quantization=identity(settings.quantize),
        fidelity=report.document() | {"out": None},
        **manifest.inherit(sources),
    )
