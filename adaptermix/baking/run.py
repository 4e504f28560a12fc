"""`bake`: adapters written into their base model, and what is left of them there."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import manifest
from ..adapters import open_adapters
from ..algebra import LowRank
from ..checkpointing.reading import base_entry
from ..checkpointing.writing import DTYPES, copy_companions, parse_size, plan_shards, write_checkpoint
from ..compose.merging import merge
from ..data import DataFile
from ..errors import OutputError, PlanError
from ..evaluation.acting import acting
from ..files import whole_folder
from ..models import load_base
from ..progress import SILENT, Watcher
from ..publish.card import card
from ..quantization import identity
from ..settings import BakeSettings
from .activations import known_inputs, read_texts
from .fidelity import Fidelity, fidelity
from .grid import quantize, stored
from .planning import WHOLE, BakePlan, prepare
from .report import BakedModule, BakeReport
from .strategies import STRATEGIES, Baked, Known, Rows, Wanted
from .writing import bytes_of, write_shards

_SAMPLED = 64
"""Rows of a weight whose rounding to 16 bits is measured."""
_IN_FOUR_BITS = ("requantize", "calibrated")
"""What `auto` tries before it leaves a module in 16 bits."""


class _Work:
    """Makes the tensors of a result, and keeps what is told of them."""

    def __init__(self, plan: BakePlan, known: dict[str, Known]) -> None:
        self._plan, self._known = plan, known
        self.modules: dict[str, BakedModule] = {}
        self.whole: list[str] = []
        self._shifts: dict[str, Tensor] = {}

    def deltas(self) -> dict[str, Callable[[], Tensor | LowRank]]:
        """Return what makes the delta of each tensor of a result in 16 bits."""
        plan = self._plan
        changed = sorted(set(plan.names) | (plan.linear if plan.strategy == "dequant-16" else set()))
        return {name: partial(self._delta, name) for name in changed}

    def _delta(self, name: str) -> Tensor | LowRank:
        """Return what is added to a tensor: from its own values to those of its 4 bits, if meant, and the delta."""
        plan, tensor = self._plan, self._plan.checkpoint.load(name)
        moved = None
        if plan.strategy == "dequant-16" and name in plan.linear:
            before = tensor.float().to(plan.device)
            moved = quantize(before, kind=plan.settings.quantize).weight() - before
            if name not in plan.names:
                return moved
        update = plan.update(name)
        rows = torch.linspace(0, len(tensor) - 1, min(len(tensor), _SAMPLED)).round().long()
        if isinstance(update, LowRank) and not plan.is_turned(name) and tensor.ndim == 2:
            delta: Tensor | LowRank = update
            some = (update.b[rows.to(update.b.device)] * update.scale @ update.a).float().cpu()
        else:
            delta = plan.delta(name)
            some = delta[rows.to(delta.device)].cpu()
        start = tensor[rows].float()
        start = start if moved is None else start + moved[rows.to(moved.device)].cpu()
        kept = (start + some).to(plan.dtype_of(name, tensor)).float() - start
        self._report(name, plan.strategy, some, kept)
        return delta if moved is None else moved + plan.delta(name)

    def groups(self, watch: Watcher) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of a result in 4 bits; biases come after the weights of their modules."""
        plan = self._plan
        biases = {plan.bias_of(name) for name in plan.names}
        order = sorted(plan.checkpoint.tensors, key=lambda name: (name in biases, name))
        with watch.track("bake", len(order)) as advance:
            for name in order:
                tensor = plan.checkpoint.load(name)
                if name in plan.linear:
                    yield {key: value.cpu() for key, value in self._in_four_bits(name, tensor).items()}
                else:
                    found = tensor if name not in self._shifts else tensor.float() + self._shifts[name].cpu()
                    yield {name: self._narrowed(name, found, tensor)}
                advance(1, name)

    def _narrowed(self, name: str, found: Tensor, tensor: Tensor) -> Tensor:
        result = found.to(self._plan.dtype_of(name, tensor))
        if result.is_floating_point() and not torch.isfinite(result).all() and torch.isfinite(tensor).all():
            raise OutputError(f"'{name}' must be finite in {result.dtype}, and overflows it. Choose a wider --dtype.")
        return result

    def _in_four_bits(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        plan = self._plan
        base = quantize(tensor.float().to(plan.device), kind=plan.settings.quantize)
        base.state.dtype = plan.dtype_of(name, tensor)
        if name not in plan.names:
            return stored(name, base)
        bias = plan.bias_of(name)
        wanted = Wanted(
            base=base,
            delta=plan.delta(name),
            known=self._known.get(name),
            settle=None if bias is None else partial(self._settle, bias),
            seed=plan.settings.seed + zlib.crc32(name.encode()),
        )
        strategy, baked = self._baked(name, wanted)
        if baked is None:
            self.whole.append(plan.paths[name])
            result = self._narrowed(name, base.weight() + wanted.delta, tensor)
            self._report(name, "dequant-16", wanted.delta, result.float() - base.weight())
            return {name: result}
        if baked.shift is not None and bias is not None:
            self._shifts[bias] = baked.shift
        rows = self._held(name)
        self._tell(name, strategy, wanted.measured(baked.weight, rows, baked.shift if rows else None))
        return stored(name, baked.weight)

    def _settle(self, bias: str, shift: Tensor) -> Tensor:
        """Return what will have been added to a bias, as it is stored."""
        before = self._plan.checkpoint.load(bias)
        wide = before.float().to(shift.device)
        return (wide + shift).to(self._plan.dtype_of(bias, before)).float() - wide

    def _baked(self, name: str, wanted: Wanted) -> tuple[str, Baked | None]:
        """Return what a strategy gives; with `auto` the one of least error of those that keep enough, if any does."""
        asked = self._plan.strategy
        try:
            if asked != "auto":
                return asked, STRATEGIES[asked](wanted)
            if wanted.known is None or not wanted.known.is_enough:
                return "dequant-16", None
            found = {title: STRATEGIES[title](wanted) for title in _IN_FOUR_BITS}
        except ValueError as error:
            raise PlanError(
                f"module '{self._plan.names[name]}': {error}. Give other texts with --calibration, or another "
                "--strategy."
            ) from error
        # both parts must keep enough: the one to choose on, and the one that is told
        least, known = self._plan.settings.keep_at_least, wanted.known
        errors = {}
        for title, baked in found.items():
            on_choice = wanted.measured(baked.weight, known.chosen, baked.shift)
            held = wanted.measured(baked.weight, known.held, baked.shift)
            if min(on_choice.kept, held.kept) >= least:
                errors[title] = on_choice.error
        if not errors:
            return "dequant-16", None
        best = min(errors, key=lambda title: errors[title])
        return best, found[best]

    def _report(self, name: str, strategy: str, delta: Tensor, realised: Tensor) -> None:
        """Keep what rounding to 16 bits leaves of a delta, of some rows of it."""
        rows = self._held(name)
        self._tell(name, strategy, fidelity(delta, realised, None if rows is None else rows.moment.to(delta.device)))

    def _held(self, name: str) -> Rows | None:
        """Return the rows to measure a module on, if texts reached it."""
        known = self._known.get(name)
        return known.held if known is not None and known.is_enough else None

    def _tell(self, name: str, strategy: str, found: Fidelity) -> None:
        on_texts = self._held(name) is not None
        self.modules[self._plan.names[name]] = BakedModule(strategy=strategy, fidelity=found, on_texts=on_texts)


def bake(settings: BakeSettings, *, watch: Watcher = SILENT) -> BakeReport:
    """Write adapters into their base model, and measure what is left of them.

    The sum of the adapters' deltas is added in float32 and rounded once. In 4 bits (`--quantize`) the base is rounded
    as bitsandbytes does, and the delta is written as the strategy says; the result loads with transformers and
    bitsandbytes alone. One tensor at a time is in memory; with calibration texts the model is too, and what is known
    of the inputs of all modules that the adapters act on.

    Raises:
        AdapterMixError: adapters and base do not fit, too little of the adapter would be kept, or the output cannot
            be written.
    """
    if settings.strategy == "keep":
        return _kept_apart(settings, watch)
    plan = prepare(settings)
    _note_quantiser(plan, watch)
    known, files = _calibrate(plan, watch) if settings.calibration else ({}, [])
    work, out = _Work(plan, known), Path(settings.out)
    if settings.dry_run:
        return _report(plan, work, _tried(plan, work, watch), None)
    with whole_folder(out, overwrite=settings.overwrite) as folder:
        report = _report(plan, work, _written(plan, work, folder, watch), out)
        _check_kept(plan, report)
        document = _document(plan, report, files)
        manifest.write(folder, document)
        (folder / "README.md").write_text(card(document, name=out.name), encoding="utf-8")
    return report


def _report(plan: BakePlan, work: _Work, size: int, out: Path | None) -> BakeReport:
    least = plan.settings.keep_at_least
    modules = dict(sorted(work.modules.items()))
    return BakeReport(strategy=plan.strategy, modules=modules, bytes=size, least=least, out=out)


def _note_quantiser(plan: BakePlan, watch: Watcher) -> None:
    """Tell where an adapter was trained on another form of the base than is meant here."""
    for source in plan.merge.sources:
        trained = source.meta.manifest.get("base", {}).get("quantization") or {"format": "none"}
        if source.meta.manifest.get("kind") and trained.get("format") != plan.settings.quantize:
            watch.note(
                f"note: adapter '{source.name}' was trained on a base of format {trained.get('format')}, and "
                f"--quantize says {plan.settings.quantize}."
            )


def _calibrate(plan: BakePlan, watch: Watcher) -> tuple[dict[str, Known], list[DataFile]]:
    """Let the model with the adapters read the texts; return what is known of the inputs of its linear layers."""
    settings = plan.settings
    texts, files = read_texts(settings.calibration)
    base = load_base(settings.base, device=settings.device, dtype="auto")
    wanted = {name: plan.paths[name] for name in plan.names if name in plan.paths}
    with acting(base, plan.merge.sources, heads=False):
        return dict(known_inputs(base, texts, wanted, watch)), files


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
    headers = [header for source in open_adapters(settings.adapter) for header in source.modules.values()]
    return BakeReport(
        strategy="keep",
        modules={path: BakedModule(strategy="keep", fidelity=whole, on_texts=False) for path in merged.modules},
        bytes=sum(4 * header.rank * (header.out + header.into) for header in headers),
        least=0.0,
        out=None if settings.dry_run else Path(settings.out),
    )


def _written(plan: BakePlan, work: _Work, folder: Path, watch: Watcher) -> int:
    """Write the checkpoint with its config and tokenizer; return the bytes of its tensors."""
    settings = plan.settings
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    if plan.strategy in WHOLE:
        options: dict[str, Any] = {"dtype": dtype, "shard_size": settings.shard_size}
        write_checkpoint(plan.checkpoint, folder, work.deltas(), watch=watch, **options)
        return _size(plan, dtype)
    size = write_shards(folder, work.groups(watch), limit=parse_size(settings.shard_size))
    copy_companions(plan.checkpoint, folder, dtype=dtype)
    _name_quantiser(folder, plan, work.whole)
    return size


def _tried(plan: BakePlan, work: _Work, watch: Watcher) -> int:
    """Do all but write; return the bytes that there would be."""
    if plan.strategy not in WHOLE:
        return sum(map(bytes_of, work.groups(watch)))
    makers = work.deltas()
    with watch.track("bake", len(makers)) as advance:
        for name, make in makers.items():
            make()
            advance(1, name)
    return _size(plan, DTYPES[plan.settings.dtype] if plan.settings.dtype else None)


def _size(plan: BakePlan, dtype: torch.dtype | None) -> int:
    shards = plan_shards(plan.checkpoint, dtype=dtype, shard_size=plan.settings.shard_size)
    return sum(kind.itemsize * math.prod(shape) for shard in shards for kind, shape in shard.headers.values())


def _check_kept(plan: BakePlan, report: BakeReport) -> None:
    """Refuse a result that has lost the adapter."""
    if report.is_enough:
        return
    kept = report.overall.kept
    whole = sum(header.size for header in plan.checkpoint.tensors.values()) / 1e9
    ways = f"--strategy dequant-16 is not held to 4 bits ({whole:.3g} GB instead of {report.bytes / 1e9:.3g})"
    if plan.strategy not in ("auto", *WHOLE):
        ways += ", and auto, with texts for --calibration, leaves in 16 bits only what 4 bits cannot hold"
    raise PlanError(
        f"at least {report.least:g} of the adapter's effect must be kept, and strategy '{report.strategy}' keeps "
        f"{kept:.3f} (on {report.measured_on}). {ways}; --keep-at-least {max(0, kept - 0.005):.2f} takes it as it is."
    )


def _name_quantiser(folder: Path, plan: BakePlan, whole: list[str]) -> None:
    """Let the config say what is in 4 bits, as transformers writes it."""
    from transformers import BitsAndBytesConfig

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # a model that is loaded without its head has other paths
    short = [name.partition(".")[2] for name in whole if "." in name]
    named = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=plan.settings.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        llm_int8_skip_modules=[*plan.skipped, *sorted({*whole, *short})],
    )
    config["quantization_config"] = named.to_dict()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _document(plan: BakePlan, report: BakeReport, files: list[DataFile]) -> dict[str, Any]:
    settings, sources = plan.settings, plan.merge.sources
    return manifest.manifest(
        "bake",
        artifact="checkpoint",
        plan=settings.model_dump(mode="json", exclude={"out", "overwrite", "dry_run", "device"}),
        base=base_entry(settings.base, plan.checkpoint),
        inputs=[manifest.input_entry(source, 1.0) for source in sources],
        calibration=[file.entry() for file in files] or None,
        quantization=identity(settings.quantize),
        fidelity=report.document() | {"out": None},
        **manifest.inherit(sources),
    )
