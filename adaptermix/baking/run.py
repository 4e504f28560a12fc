"""`bake`: adapters written into their base model, and what is left of them there."""

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
from tempfile import TemporaryDirectory
from typing import Any

from ..adapters import AdapterSource, AdapterState, TargetSpec, write_adapter
from ..checkpoints.quantized import QuantizedCheckpoint, as_whole
from ..checkpoints.reading import base_entry, open_model
from ..checkpoints.tensor_writing import bytes_of, write_shards
from ..checkpoints.writing import copy_companions, parse_size, plan_shards, write_checkpoint
from ..errors import PlanError
from ..io.files import whole_folder
from ..io.fingerprints import companion_digest
from ..merging.merge_adapters import merge
from ..merging.on_model import acting
from ..models.base import load_base
from ..models.quantization import config_of_format
from ..options import BakeSettings
from ..options.paths import holds_output
from ..options.roles import Role, marked
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
from .tensor_writer import Work

BESIDE = "residual"
"""Folder, in that of a result, of the LoRA that stays beside it."""
_SLOW = ("auto", "calibrated", "residual")
"""Strategies whose modules are kept for an interrupted run."""
_SPENDING = ("keep_at_least", "error_at_most", "seed")
"""What strategies with several outcomes choose by, and a seed that others draw with."""


@holds_output
def bake(settings: BakeSettings, *, watch: Watcher = SILENT) -> BakeReport:
    """Write adapters into their base model, and measure what is left of them.

    The sum of the adapters' deltas is added in float32 and rounded once. With `--quantize` the base is rounded as
    bitsandbytes does, or is so already, and the delta is written as the strategy says; the result loads with
    transformers and bitsandbytes alone. One tensor at a time is in memory; with calibration texts the model is too,
    and what is known of the inputs of as many modules as fit. An interrupted run that chooses codes goes on with the
    same call.

    Raises:
        AdapterMixError: adapters and base do not fit, too little of the adapter would be kept, or the output cannot
            be written.
    """
    if settings.strategy == "keep":
        return _kept_apart(settings, watch)
    plan = prepare(settings)
    _check_quantiser(plan, watch)
    if settings.task:
        check_task(plan, watch)
    out = Path(settings.out)
    with ExitStack() as stack:
        inputs = _Inputs(plan, watch)
        stack.callback(inputs.close)
        if settings.dry_run:
            work = Work(plan, inputs.of, Journal(None), compare=True)
            if not settings.task:
                return _report(plan, work, _tried(plan, work, watch))
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="adaptermix-")))
        else:
            notes = journal(out, _identity(plan, inputs), watch) if _is_kept(plan) else nullcontext(Journal(None))
            kept = stack.enter_context(notes)
            folder = stack.enter_context(whole_folder(out, overwrite=settings.overwrite))
            work = Work(plan, inputs.of, kept)
        report = _report(plan, work, _written(plan, work, folder, watch), out=None if settings.dry_run else out)
        if not settings.dry_run:
            _check_kept(plan, report)
        _tell_lost(report, watch)
        inputs.close()
        if settings.task:
            beside = folder / BESIDE if work.beside else None
            report = replace(report, task=scores(plan, folder, beside, watch))
        document = _document(plan, report, inputs)
        write_documents(folder, document, name=out.name)
        if work.beside:
            manifest.write(folder / BESIDE, document | {"artifact": "adapter"})
    return report


def _is_kept(plan: BakePlan) -> bool:
    """Whether finished modules are kept for an interrupted run."""
    return plan.strategy in _SLOW and bool(plan.settings.calibration)


def _report(plan: BakePlan, work: Work, size: int, out: Path | None = None) -> BakeReport:
    return BakeReport(
        strategy=plan.strategy,
        modules=dict(sorted(work.modules.items())),
        bytes=size,
        least=plan.settings.keep_at_least,
        out=out,
        lora_bytes=_lora_bytes(plan.merge.sources),
        whole_bytes=_size(plan),
    )


def _lora_bytes(sources: Iterable[AdapterSource]) -> int:
    """Return the size of the adapters as one LoRA, in float32 and of one rank as merges write it."""
    ranks: Counter[str] = Counter()
    sides = {}
    for source in sources:
        for module, header in source.modules.items():
            ranks[module] += source.rank(module)
            sides[module] = header.out + header.into
    return 4 * max(ranks.values()) * sum(sides.values())


def _check_quantiser(plan: BakePlan, watch: Watcher) -> None:
    """Refuse to write an adapter into another form of its base than it was trained on, where that is not asked for."""
    settings = plan.settings
    meant = plan.quantiser() or {"format": "none"}
    for source in plan.merge.sources:
        entry = source.meta.manifest.get("base")
        trained = (entry.get("quantization") if isinstance(entry, Mapping) else None) or {"format": "none"}
        if trained == meant or trained["format"] == "none":  # whole weights are what codes are made from
            continue
        told = f"adapter '{source.name}' was trained on a base of format {trained['format']}"
        if settings.strategy == "merge-16" or settings.allow_base_mismatch:
            watch.note(f"note: {told}, and is written onto weights that it has not seen ({meant['format']}).")
        elif trained["format"] != meant["format"]:
            raise PlanError(
                f"{told}, and --quantize says {settings.quantize}. Pass --quantize {trained['format']} (with "
                "--strategy dequant-16 for 16 bits), or --allow-base-mismatch to write it onto weights that it has not "
                "seen."
            )
        else:
            watch.note(f"note: {told} {trained}, and the result is {meant}.")


class _Inputs:
    """What calibration texts tell of modules' inputs; the model is loaded when that is first asked for."""

    def __init__(self, plan: BakePlan, watch: Watcher) -> None:
        self._plan, self._stack, self._watch = plan, ExitStack(), watch
        settings = plan.settings
        self.texts, self.files = read_texts(settings.calibration) if settings.calibration else ([], [])
        self.tested = refuse_tested({CALIBRATION: self.files}, allowed=settings.allow_tested, watch=watch)
        fitted = [SeenFile(entry=file.entry(), hashes=file.row_hashes()) for file in self.files]
        _, dev = get_task(settings.task).read(settings.dev, rows=settings.rows) if settings.task else ([], [])
        both = next((found for file in dev if (found := overlap_of(file, fitted)) and found.rows.matters), None)
        if both:
            raise PlanError(
                f"a dev score must be of rows that codes were not fitted to, and {both} are in the --calibration file "
                f"{both.first.name} too. Give other texts."
            )

    @cached_property
    def _measured(self) -> InputsOfModules:
        plan = self._plan
        base = load_base(plan.settings.base, device=plan.settings.device, dtype="auto")
        self._stack.enter_context(acting(base, plan.merge.sources, heads=False))
        wanted = {
            name: plan.paths[name] for name in plan.checkpoint.tensors if name in plan.names and name in plan.paths
        }
        return InputsOfModules(base, self.texts, wanted, self._watch)

    def of(self, name: str) -> Known | None:
        """Return what is known of the inputs of a weight's module."""
        return self._measured.of(name) if self.texts and name in self._plan.paths else None

    def close(self) -> None:
        """Let go of the model and of what is known."""
        self._stack.close()
        self.__dict__.pop("_measured", None)


def _identity(plan: BakePlan, inputs: _Inputs) -> dict[str, Any]:
    """Return what finished modules depend on."""
    without_effect = marked(plan.settings, Role.HANDLING, Role.SCHEDULING, Role.MACHINE, Role.AFTERWARDS)
    settings = plan.settings.model_dump(mode="json", exclude={"out", *without_effect})
    if plan.strategy == "calibrated":  # these change nothing there
        settings = {name: value for name, value in settings.items() if name not in _SPENDING}
    return {
        "settings": settings,
        "measured": 2,  # raised where modules are measured or chosen in another way
        "device": plan.device.type,  # the dtype of a pass depends on it
        "versions": {name: version(name) for name in ("adaptermix", "torch", "transformers", "bitsandbytes")},
        "base": base_entry(plan.settings.base, plan.checkpoint),
        "base_files": companion_digest(plan.checkpoint.path),
        "adapters": [source.digest for source in plan.merge.sources],
        "calibration": [file.entry() for file in inputs.files],
    }


def _kept_apart(settings: BakeSettings, watch: Watcher) -> BakeReport:
    """Write the sum of the adapters as one LoRA: the base's codes stay, and nothing is lost."""
    is_quantized = isinstance(as_whole(open_model(settings.base)), QuantizedCheckpoint)
    merged = merge(
        settings.adapter,
        weights=[1.0] * len(settings.adapter),
        base=settings.base,
        out=settings.out,
        overwrite=settings.overwrite,
        dry_run=settings.dry_run,
        # the files of a quantised base are others than those that it was made from
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


def _written(plan: BakePlan, work: Work, folder: Path, watch: Watcher) -> int:
    """Write the checkpoint with its config and tokenizer; return the bytes of its tensors."""
    settings = plan.settings
    if plan.strategy in WHOLE:
        options: dict[str, Any] = {"dtype": plan.asked_dtype, "shard_size": settings.shard_size}
        # small factors are made beside the threads that add them, of which none should wait for others
        threads = 1 if plan.strategy == "merge-16" else None
        write_checkpoint(plan.checkpoint, folder, work.deltas(), maker_threads=threads, watch=watch, **options)
        _name_quantiser(folder, None)
        return _size(plan)
    size = write_shards(folder, work.groups(watch), limit=parse_size(settings.shard_size))
    copy_companions(plan.checkpoint, folder, dtype=plan.asked_dtype)
    _name_quantiser(folder, _quantiser(folder, plan, work.whole))
    if work.beside:
        _write_beside(folder / BESIDE, plan, work)
    return size + work.beside_bytes()


def _write_beside(folder: Path, plan: BakePlan, work: Work) -> None:
    folder.mkdir()
    meta = replace(
        plan.merge.meta(),
        base=str(Path(plan.settings.out).absolute()),
        revision=None,
        dora=False,
        targets=TargetSpec(modules=tuple(sorted(work.beside))),
    )
    # Beside a quantised base the size is what counts, so each module keeps the rank that it needs.
    write_adapter(folder, AdapterState.of_updates(meta, work.beside), dtype=work.beside_dtype, compact=True)


def _tried(plan: BakePlan, work: Work, watch: Watcher) -> int:
    """Do all but write; return the bytes that there would be."""
    if plan.strategy not in WHOLE:
        return sum(map(bytes_of, work.groups(watch))) + work.beside_bytes()
    makers = work.deltas()
    with watch.track("bake", len(makers)) as advance:
        for name, make in makers.items():
            make()
            advance(1, name)
    return _size(plan)


def _size(plan: BakePlan) -> int:
    """Return the bytes of the whole model in 16 bits."""
    shards = plan_shards(plan.checkpoint, dtype=plan.asked_dtype, shard_size=plan.settings.shard_size)
    return sum(kind.itemsize * math.prod(shape) for shard in shards for kind, shape in shard.headers.values())


def _check_kept(plan: BakePlan, report: BakeReport) -> None:
    """Refuse a result that has lost the adapter, and name what would not."""
    if report.is_enough:
        return
    kept, found = report.overall.least_kept, report.compared()
    least = math.floor(kept * 100) / 100
    ways = [f"keep ({_gigabytes(report.lora_bytes)} beside the base)"]
    in_16 = found.get("dequant-16")
    if in_16 and in_16.kept >= report.least:
        ways.append(f"dequant-16 ({in_16.kept:.3f}, {_gigabytes(in_16.bytes)})")
        between = f"between {_gigabytes(report.bytes)} and that; --dry-run with --calibration measures them"
        ways.append(" and ".join(name for name in ("residual", "auto") if name != report.strategy) + f" ({between})")
    can_go_on = " from what is worked out" if plan.strategy == "calibrated" else ""
    raise PlanError(
        f"at least {report.least:g} of the adapter's effect must be kept, and strategy '{report.strategy}' keeps "
        f"{kept:.3f} (on {report.measured_on}). What keeps enough: {'; '.join(ways)}."
        + (f" --keep-at-least {least:.2f} takes it as it is{can_go_on}." if least >= 0 else "")
    )


def _tell_lost(report: BakeReport, watch: Watcher) -> None:
    if lost := report.lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        watch.note(
            f"note: in {len(lost)} of {len(report.modules)} modules the error is as large as the adapter's effect "
            f"({', '.join(lost[:3])}{more}), so there outputs are no nearer to what is meant than without the adapter. "
            "--strategy auto keeps such modules in 16 bits."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _quantiser(folder: Path, plan: BakePlan, whole: list[str]) -> dict[str, Any]:
    """Return what the config says of what is quantised, as transformers writes it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # a model that is loaded without its head has other paths
    short = [name.partition(".")[2] for name in whole if "." in name]
    left = [*plan.skipped, *sorted({*whole, *short})]
    if "quantization_config" in config:
        return {**config["quantization_config"], "llm_int8_skip_modules": left}
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    named: dict[str, Any] = config_of_format(plan.settings.quantize, dtype=dtype, skipped=left).to_dict()
    return named


def _name_quantiser(folder: Path, quantiser: Mapping[str, Any] | None) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if quantiser is None and "quantization_config" not in config:
        return
    config.pop("quantization_config", None)
    config |= {} if quantiser is None else {"quantization_config": dict(quantiser)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _document(plan: BakePlan, report: BakeReport, inputs: _Inputs) -> dict[str, Any]:
    settings, sources = plan.settings, plan.merge.sources
    return manifest.manifest(
        "bake",
        artifact="checkpoint",
        plan=settings.model_dump(mode="json", exclude={"out", "overwrite", "dry_run", "device"}),
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
