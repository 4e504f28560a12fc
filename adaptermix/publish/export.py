"""Export an adapter to the files of an inference engine, and prove that the engine computes the same deltas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters import AdapterModule, AdapterSource, ModuleHeader, open_adapter
from ..adapters.base_weights import load_module, without_copies
from ..adapters.kinds import kinds_of
from ..algebra import LowRank
from ..errors import ModelError, OutputError, PlanError
from ..io.checkpoint_files import Checkpoint, open_checkpoint, resolve_checkpoint
from ..io.files import check_output, whole_folder
from ..models.kinds import kind_of
from ..models.pretrained import cached_file, load_config, split_revision
from ..models.stack import stack_folder
from ..options import ExportSettings
from ..options.paths import holds_output
from ..progress import SILENT, Watcher
from ..provenance import manifest
from .engines import ENGINES, Engine, PlainAdapter, fill, refuse_unserved
from .export_report import ExportedModule, ExportReport
from .output import write_documents

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MOST_ERROR = 0.01
"""Most that a module may differ from the adapter's delta, relative to it; rounding to 16 bits costs about 0.003."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@holds_output
def export(settings: ExportSettings, *, watch: Watcher = SILENT) -> ExportReport:
    """Write an adapter for an inference engine, and compare the deltas that the engine computes with the adapter's.

    Every module gets one rank and scale 1. rsLoRA, patterns and starts from the base weights (PiSSA, OLoRA) become a
    plain LoRA of the same delta. The deltas are read back from the written files by the rule of the engine, and
    compared in float64.

    Args:
        settings: The adapter, the engine and the output.
        watch: Receives progress.

    Raises:
        AdapterFormatError: the adapter is damaged.
        ModelError: the base model is needed and cannot be read, or does not fit.
        PlanError: the engine cannot serve the adapter, or the base model is missing.
        OutputError: the output cannot be written, or the engine would compute another delta.
    """
    out, engine = Path(settings.out), ENGINES[settings.engine]
    if not settings.dry_run:
        check_output(out, overwrite=settings.overwrite)
    adapter, source = _prepare(settings, engine)
    base = settings.base or adapter.meta.base or "BASE"
    report = ExportReport(
        out=out,
        engine=engine.name,
        rank=adapter.rank,
        modules={},
        commands=tuple(fill(command, base=base, adapter=settings.out) for command in engine.commands(adapter)),
    )
    if settings.dry_run:
        return replace(report, modules=_compared(adapter, None, watch))
    with whole_folder(out, overwrite=settings.overwrite) as folder:
        engine.write(folder, adapter)
        files = list(folder.iterdir())
        modules = _compared(adapter, engine.reader(folder, adapter), watch)
        _check(modules, engine)
        report = replace(report, modules=modules, bytes=sum(path.stat().st_size for path in files))
        write_documents(folder, _document(settings, report, adapter, source), name=out.name)
    return report


def _prepare(settings: ExportSettings, engine: Engine) -> tuple[PlainAdapter, AdapterSource]:
    """Return the adapter as plain updates and as it was opened, or refuse it."""
    source = open_adapter(settings.folder)
    meta = source.meta
    pinned = f"{meta.base}@{meta.revision}" if meta.base and meta.revision else meta.base
    reference = settings.base or pinned
    config = _config(reference, engine)
    checkpoint = _checkpoint(settings.base, source)
    if checkpoint is not None:
        source = without_copies(source, checkpoint)
    refuse_unserved(engine, source, is_encoder=_is_encoder(source, config, reference))
    load = _loader(source, checkpoint)
    headers = {path: load(path).header for path in source.modules} if kinds_of(meta) else _headers(source)
    adapter = PlainAdapter(
        name=source.name,
        meta=replace(meta, base=settings.base or meta.base, initial=None, peft_type="LORA"),
        headers={path: replace(header, scale=1.0) for path, header in headers.items()},
        load=load,
        config=config,
        dtype=_DTYPES[settings.dtype],
    )
    engine.check(adapter)
    return adapter, source


def _config(reference: str | None, engine: Engine) -> PreTrainedConfig | None:
    """Return the base model's configuration; None if it is not on disk and the engine does not need it.

    Raises:
        ModelError: it is needed and cannot be read.
        PlanError: the base model is a stack, or is needed and not named.
    """
    if reference is None:
        if engine.needs_config:
            raise PlanError(
                f"--for {engine.name} needs the configuration of the base model, which the adapter does not name. Pass "
                "--base MODEL.",
                code="export.no-base",
            )
        return None
    if stack_folder(reference):
        raise PlanError(
            f"{engine.name} must have a language model as base, and {reference} is a stack of two models. Use "
            "adaptermix evaluate.",
            code="export.stack",
        )
    name, revision = split_revision(reference)
    if engine.needs_config or cached_file(name, "config.json", revision) is not None:
        return load_config(reference)
    return None


def _checkpoint(base: str | None, source: AdapterSource) -> Checkpoint | None:
    """Open the weights of the base model, if they are passed and needed: to convert factors, or to find copies."""
    if base is None or not (kinds_of(source.meta) or source.saved_headers):
        return None
    return open_checkpoint(resolve_checkpoint(base))


def _is_encoder(source: AdapterSource, config: PreTrainedConfig | None, reference: str | None) -> bool:
    if config is None:
        return manifest.base_entry([source.meta])["class"] == "encoder"
    try:
        return kind_of(config, reference or source.name) == "encoder"
    except ModelError:  # such as a vision-language model
        return False


def _headers(source: AdapterSource) -> dict[str, ModuleHeader]:
    """Return the shapes of plain modules, without ranks that are zero."""
    return {path: replace(header, rank=source.rank(path)) for path, header in source.modules.items()}


def _loader(source: AdapterSource, checkpoint: Checkpoint | None) -> Callable[[str], AdapterModule]:
    """Return a function that reads the plain update of a module."""
    if not kinds_of(source.meta):
        return source.module
    # The conversion decomposes base weights, so it is done once.
    modules = {path: load_module(source, path, checkpoint) for path in source.modules}
    return modules.__getitem__


def _compared(
    adapter: PlainAdapter, read: Callable[[str], LowRank] | None, watch: Watcher
) -> dict[str, ExportedModule]:
    """Return the report per module; without a reader the errors are None."""
    modules = {}
    with watch.track("export", len(adapter.headers)) as advance:
        for path, header in adapter.headers.items():
            norm, error = _difference(adapter.load(path).update, None if read is None else read(path))
            modules[path] = ExportedModule(rank=header.rank, norm=norm, error=error)
            advance(1, path)
    return modules


def _difference(true: LowRank, written: LowRank | None) -> tuple[float, float | None]:
    """Return the norm of an update, and the relative distance of another one, in float64."""
    norm = _norm(true.scale * true.b.double(), true.a.double())
    if written is None:
        return norm, None
    left = torch.cat([true.scale * true.b.double(), -written.scale * written.b.double()], dim=1)
    distance = _norm(left, torch.cat([true.a.double(), written.a.double()]))
    return norm, distance / norm if norm else (math.inf if distance else 0.0)


def _norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of a product from QR decompositions, which keep all digits where terms cancel."""
    left, right = (torch.linalg.qr(factor, mode="r").R for factor in (b, a.T))
    return float((left @ right.T).norm())


def _check(modules: dict[str, ExportedModule], engine: Engine) -> None:
    """Refuse an output of which the engine would compute another delta."""
    path, worst = max(modules.items(), key=lambda item: item[1].error or 0.0)
    if (worst.error or 0.0) > _MOST_ERROR:
        raise OutputError(
            f"{engine.name} must compute the delta of module '{path}' within {_MOST_ERROR:.0%}, and differs by "
            f"{worst.error:.2%}. Choose a wider dtype.",
            code="export.delta",
        )


def _document(
    settings: ExportSettings, report: ExportReport, adapter: PlainAdapter, source: AdapterSource
) -> dict[str, object]:
    """Return the manifest."""
    engine = ENGINES[settings.engine]
    return manifest.manifest(
        "export",
        plan={"engine": engine.name, "dtype": settings.dtype, "rank": adapter.rank},
        base=manifest.base_entry([adapter.meta]),
        inputs=[manifest.input_entry(source, 1.0)],
        fidelity=report.fidelity(),
        artifact=None if engine.artifact == "adapter" else engine.artifact,
        serve={"engine": engine.name, "commands": list(engine.commands(adapter))},
        **manifest.inherit([source]),
    )
