"""The `bake` command: merge adapters into their base model and measure how much of their effect remains."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from ..adapters import AdapterSource, AdapterState, TargetSpec, write_adapter
from ..checkpoints.reading import base_entry, open_model
from ..checkpoints.tensor_writing import bytes_of, write_shards
from ..checkpoints.writing import copy_companions, parse_size, plan_shards, write_checkpoint
from ..errors import PlanError
from ..io.files import whole_folder
from ..io.fingerprints import companion_digest
from ..io.json_types import JsonObject
from ..io.temporary import temporary_folder
from ..merging.merge_adapters import merge
from ..merging.on_model import acting
from ..models.base import load_base
from ..models.formats import FORMATS
from ..models.formats.checkpoint import DequantizedCheckpoint, as_whole
from ..options import BakeSettings
from ..options.paths import holds_output
from ..options.roles import NO_PART_OF_RESULT, Role, marked
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..provenance.manifest import SeenFile
from ..publish.output import write_documents
from ..tasks import get_task
from ..tasks.splits import CALIBRATION, overlap_of, refuse_tested
from .activations import InputsOfModules, read_texts
from .dev_score import check_task, scores
from .fidelity import Fidelity
from .journal import Journal, journal
from .plan import WHOLE, BakePlan, prepare
from .report import BakedModule, BakeReport
from .strategies import Known
from .tensor_writer import TensorWriter

RESIDUAL = "residual"
"""Subfolder of a result with its residual LoRA."""
_SLOW = ("auto", "calibrated", "residual")
"""Strategies whose finished modules are kept for an interrupted run."""


@holds_output
def bake(settings: BakeSettings, *, watch: Watcher = SILENT) -> BakeReport:
    """Bake adapters into a single model, which is not a stack; see `baking.bake`.

    Raises:
        AdapterMixError: adapters and base do not match, too little of the adapter's effect would remain, or the output
            cannot be written.
    """
    if settings.strategy == "keep":
        return _kept_apart(settings, watch)
    plan = prepare(settings)
    _check_quantiser(plan, watch)
    _tell_unfit(plan, watch)
    if settings.task:
        check_task(plan, watch)
    out = Path(settings.out)
    with ExitStack() as stack:
        inputs = _Inputs(plan, watch)
        stack.callback(inputs.close)
        if settings.dry_run:
            writer = TensorWriter(plan, inputs.of, Journal(None), compare=True)
            if not settings.task:
                return _report(plan, writer, _tried(plan, writer, watch))
            folder = stack.enter_context(temporary_folder())
        else:
            notes = journal(out, _identity(plan, inputs), watch) if _is_kept(plan) else nullcontext(Journal(None))
            kept = stack.enter_context(notes)
            folder = stack.enter_context(whole_folder(out, overwrite=settings.overwrite))
            writer = TensorWriter(plan, inputs.of, kept)
        report = _report(plan, writer, _written(plan, writer, folder, watch), out=None if settings.dry_run else out)
        if not settings.dry_run:
            _check_kept(plan, report)
        _tell_lost(report, watch)
        inputs.close()
        if settings.task:
            lora = folder / RESIDUAL if writer.lora else None
            report = replace(report, task=scores(plan, folder, lora, watch))
        document = _document(plan, report, inputs)
        write_documents(folder, document, name=out.name)
        if writer.lora:
            manifest.write(folder / RESIDUAL, document | {"artifact": "adapter"})
    return report


def _is_kept(plan: BakePlan) -> bool:
    """Whether finished modules are kept for an interrupted run."""
    return plan.strategy in _SLOW and bool(plan.settings.calibration)


def _report(plan: BakePlan, writer: TensorWriter, size: int, out: Path | None = None) -> BakeReport:
    return BakeReport(
        strategy=plan.strategy,
        modules=dict(sorted(writer.modules.items())),
        bytes=size,
        least=plan.settings.keep_at_least,
        out=out,
        lora_bytes=_lora_bytes(plan.merge.sources),
        whole_bytes=_size(plan),
    )


def _lora_bytes(sources: Iterable[AdapterSource]) -> int:
    """Return the size of the adapters as one LoRA, in float32 and with one rank, as merges write it."""
    ranks: Counter[str] = Counter()
    sides = {}
    for source in sources:
        for module, header in source.modules.items():
            ranks[module] += source.rank(module)
            sides[module] = header.out + header.into
    return 4 * max(ranks.values()) * sum(sides.values())


def _check_quantiser(plan: BakePlan, watch: Watcher) -> None:
    """Refuse to write an adapter into another form of its base than it was trained on, unless requested."""
    settings = plan.settings
    meant = plan.quantiser() or {"format": "none"}
    for source in plan.merge.sources:
        entry = source.meta.manifest.get("base")
        trained = (entry.get("quantization") if isinstance(entry, Mapping) else None) or {"format": "none"}
        if trained == meant or trained["format"] == "none":  # codes are made from unquantised weights
            continue
        trained_on = f"adapter '{source.name}' was trained on a base of format {trained['format']}"
        if settings.strategy == "merge-16" or settings.allow_base_mismatch:
            watch.note(f"note: {trained_on}, and is written onto weights of another format ({meant['format']}).")
        elif trained["format"] != meant["format"]:
            raise PlanError(
                f"{trained_on}, and --quantize is {settings.quantize}. Pass --quantize {trained['format']} (with "
                "--strategy dequant-16 for 16 bits), or --allow-base-mismatch to write it onto these weights.",
                code="bake.quantiser",
            )
        else:
            watch.note(f"note: {trained_on} {trained}, and the result is {meant}.")


def _tell_unfit(plan: BakePlan, watch: Watcher) -> None:
    """Name the layers that the format cannot hold."""
    if unfit := plan.unfit:
        more = f" and {len(unfit) - 3} more" if len(unfit) > 3 else ""
        watch.note(
            f"note: {len(unfit)} of {len(plan.paths)} linear layers stay in 16 bits, since {plan.settings.quantize} is "
            f"for {FORMATS[plan.settings.quantize].reach}: {', '.join(unfit[:3])}{more}."
        )


class _Inputs:
    """Input statistics of modules on the calibration texts; the model is loaded at the first request."""

    def __init__(self, plan: BakePlan, watch: Watcher) -> None:
        self._plan, self._stack, self._watch = plan, ExitStack(), watch
        settings = plan.settings
        self.texts, self.files = read_texts(settings.calibration) if settings.calibration else ([], [])
        self.tested = refuse_tested({CALIBRATION: self.files}, allowed=settings.allow_tested, watch=watch)
        fitted = [SeenFile(entry=file.entry(), hashes=file.row_hashes()) for file in self.files]
        task = get_task(settings.task, settings.columns) if settings.task else None
        _, dev = task.read(settings.dev, rows=settings.rows) if task else ([], [])
        both = next((overlap for file in dev if (overlap := overlap_of(file, fitted)) and overlap.rows.matters), None)
        if both:
            raise PlanError(
                f"a dev score must be of rows that codes were not fitted to, and {both} are also in the --calibration "
                f"file {both.first.name}. Give other texts.",
                code="bake.dev-in-calibration",
            )

    @cached_property
    def _measured(self) -> InputsOfModules:
        plan = self._plan
        base = load_base(plan.settings.base, device=plan.settings.device, dtype="auto")
        self._stack.enter_context(acting(base, plan.merge.sources, heads=False))
        paths = {
            name: plan.paths[name] for name in plan.checkpoint.tensors if name in plan.names and name in plan.paths
        }
        return InputsOfModules(base, self.texts, paths, self._watch)

    def of(self, name: str) -> Known | None:
        """Return the statistics of the inputs of a weight's module."""
        return self._measured.of(name) if self.texts and name in self._plan.paths else None

    def close(self) -> None:
        """Release the model and the statistics."""
        self._stack.close()
        self.__dict__.pop("_measured", None)


def _identity(plan: BakePlan, inputs: _Inputs) -> JsonObject:
    """Return the settings and inputs that finished modules depend on."""
    package = [plan.format.package] if plan.format and plan.format.package else []
    roles = [*NO_PART_OF_RESULT, Role.AFTERWARDS, *([Role.STRATEGY] if plan.strategy == "calibrated" else [])]
    return {
        "settings": plan.settings.model_dump(mode="json", exclude={"out", *marked(plan.settings, *roles)}),
        "measured": 2,  # increase this when modules are measured or chosen in another way
        "device": plan.device.type,  # the dtype of a pass depends on it
        "versions": {name: version(name) for name in ("adaptermix", "torch", "transformers", *package)},
        "base": base_entry(plan.settings.base, plan.checkpoint),
        "base_files": companion_digest(plan.checkpoint.path),
        "adapters": [source.digest for source in plan.merge.sources],
        "calibration": [file.entry() for file in inputs.files],
    }


def _kept_apart(settings: BakeSettings, watch: Watcher) -> BakeReport:
    """Write the sum of the adapters as one LoRA next to the base, whose codes do not change."""
    is_quantized = isinstance(as_whole(open_model(settings.base)), DequantizedCheckpoint)
    merged = merge(
        settings.adapter,
        weights=[1.0] * len(settings.adapter),
        base=settings.base,
        out=settings.out,
        overwrite=settings.overwrite,
        dry_run=settings.dry_run,
        # The files of a quantised base differ from those of the model that it was made from.
        allow_base_mismatch=settings.allow_base_mismatch or is_quantized,
        watch=watch,
    )
    whole = Fidelity(kept=1.0, error=0.0, codes_changed=0.0, size=1.0)
    return BakeReport(
        strategy="keep",
        modules={path: BakedModule(strategy="keep", fidelity=whole, on_texts=False) for path in merged.modules},
        bytes=merged.bytes or 0,
        least=0.0,
        out=None if settings.dry_run else Path(settings.out),
    )


def _written(plan: BakePlan, writer: TensorWriter, folder: Path, watch: Watcher) -> int:
    """Write the checkpoint with its config and tokenizer; return the bytes of its tensors."""
    settings = plan.settings
    if plan.strategy in WHOLE:
        # Small factors are computed here, so that the threads that add them never wait for each other.
        threads = 1 if plan.strategy == "merge-16" else None
        write_checkpoint(
            plan.checkpoint,
            folder,
            writer.deltas(),
            dtype=plan.requested_dtype,
            shard_size=settings.shard_size,
            maker_threads=threads,
            watch=watch,
        )
        _name_quantiser(folder, None)
        return _size(plan)
    size = write_shards(folder, writer.groups(watch), limit=parse_size(settings.shard_size))
    copy_companions(plan.checkpoint, folder, dtype=plan.requested_dtype)
    _name_quantiser(folder, _quantiser(folder, plan, writer.whole))
    if writer.lora:
        _write_residual(folder / RESIDUAL, plan, writer)
    return size + writer.lora_bytes()


def _write_residual(folder: Path, plan: BakePlan, writer: TensorWriter) -> None:
    folder.mkdir()
    meta = replace(
        plan.merge.meta(),
        base=str(Path(plan.settings.out).absolute()),
        revision=None,
        dora=False,
        targets=TargetSpec(modules=tuple(sorted(writer.lora))),
    )
    # Next to a quantised base size matters, so each module keeps the rank that it needs.
    write_adapter(folder, AdapterState.of_updates(meta, writer.lora), dtype=writer.lora_dtype, compact=True)


def _tried(plan: BakePlan, writer: TensorWriter, watch: Watcher) -> int:
    """Do everything except writing; return the bytes of the result."""
    if plan.strategy not in WHOLE:
        return sum(map(bytes_of, writer.groups(watch))) + writer.lora_bytes()
    makers = writer.deltas()
    with watch.track("bake", len(makers)) as advance:
        for name, make in makers.items():
            make()
            advance(1, name)
    return _size(plan)


def _size(plan: BakePlan) -> int:
    """Return the bytes of the whole model in 16 bits."""
    shards = plan_shards(plan.checkpoint, dtype=plan.requested_dtype, shard_size=plan.settings.shard_size)
    return sum(kind.itemsize * math.prod(shape) for shard in shards for kind, shape in shard.headers.values())


def _check_kept(plan: BakePlan, report: BakeReport) -> None:
    """Refuse a result with too little of the adapter's effect, and name strategies that keep enough."""
    if report.is_enough:
        return
    kept, compared = report.overall.least_kept, report.compared()
    least = math.floor(kept * 100) / 100
    ways = [f"keep ({_gigabytes(report.lora_bytes)} next to the base)"]
    in_16 = compared.get("dequant-16")
    if in_16 and in_16.kept >= report.least:
        ways.append(f"dequant-16 ({in_16.kept:.3f}, {_gigabytes(in_16.bytes)})")
        between = f"between {_gigabytes(report.bytes)} and that; --dry-run with --calibration measures them"
        ways.append(" and ".join(name for name in ("residual", "auto") if name != report.strategy) + f" ({between})")
    can_go_on = " from the finished modules" if plan.strategy == "calibrated" else ""
    raise PlanError(
        f"at least {report.least:g} of the adapter's effect must be kept, and strategy '{report.strategy}' keeps "
        f"{kept:.3f} (on {report.measured_on}). What keeps enough: {'; '.join(ways)}."
        + (f" --keep-at-least {least:.2f} accepts this result{can_go_on}." if least >= 0 else ""),
        code="bake.effect-lost",
    )


def _tell_lost(report: BakeReport, watch: Watcher) -> None:
    if lost := report.lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        watch.note(
            f"note: in {len(lost)} of {len(report.modules)} modules the error is as large as the adapter's effect "
            f"({', '.join(lost[:3])}{more}), so their outputs are no closer to the intended ones than without the "
            "adapter. --strategy auto keeps such modules in 16 bits."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _quantiser(folder: Path, plan: BakePlan, whole: list[str]) -> JsonObject:
    """Return the config's quantisation entry, in the form of transformers."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # A model that is loaded without its head has other paths.
    short = [name.partition(".")[2] for name in whole if "." in name]
    left = list(dict.fromkeys([*plan.skipped, *sorted({*whole, *short})]))
    form = FORMATS[plan.settings.quantize]
    if plan.is_quantized_base:
        return {**config["quantization_config"], form.skip_key: left}
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    widths = {plan.paths[name]: plan.checkpoint.tensors[name].shape[-1] for name in sorted(plan.linear)}
    return form.entry(dtype, left, {path: width for path, width in widths.items() if path not in whole})


def _name_quantiser(folder: Path, quantiser: Mapping[str, object] | None) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if quantiser is None and "quantization_config" not in config:
        return
    config.pop("quantization_config", None)
    config |= {} if quantiser is None else {"quantization_config": dict(quantiser)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _document(plan: BakePlan, report: BakeReport, inputs: _Inputs) -> JsonObject:
    settings, sources = plan.settings, plan.merge.sources
    return manifest.manifest(
        "bake",
        artifact="checkpoint",
        plan=settings.model_dump(mode="json", exclude={"out", *marked(settings, Role.HANDLING, Role.MACHINE)}),
        base=base_entry(settings.base, plan.checkpoint),
        inputs=[manifest.input_entry(source, 1.0) for source in sources],
        quantization=plan.quantiser(),
        fidelity=report.document() | {"out": None},
        **manifest.inherit(
            sources,
            models=[plan.checkpoint.path],
            calibration=[file.entry() for file in inputs.files],
            tested=inputs.tested,
        ),
    )
