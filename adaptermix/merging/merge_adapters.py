"""Merge adapter folders into one adapter, a file of deltas or a full checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch

from ..adapters import AdapterSource, open_adapters
from ..adapters.base_weights import without_copies
from ..adapters.paths import fitted
from ..checkpoints.reading import check_whole
from ..errors import IncompatibleAdapters, PlanError
from ..io.checkpoint_files import Checkpoint, open_checkpoint, open_tensors, resolve_checkpoint
from ..io.files import check_not_input, check_output, output_lock, whole_folder
from ..io.fingerprints import fingerprint
from ..io.json_types import JsonObject
from ..io.threads import torch_threads
from ..methods.base import MergeMethod, build, check_depths, check_roles
from ..models.devices import pick_device
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..publish.output import weight_bytes, write_documents
from .base_tensors import untied
from .limits import check_dense, check_residual, check_rounding, limit_of
from .merge_options import MergeKeywords, MergeOptions, merge_options
from .output_form import KEEP, Shape
from .overrides import depths_of, make_override, split_settings
from .plan import MergePlan, check, resolve_weights
from .recorded import merge_report
from .report import MergeReport, ModuleReport
from .sinks import AdapterFolder, AdapterInMemory, DeltaFile, FullCheckpoint, Sink, can_stream, run
from .statistics import check_statistics, files_behind


def make_plan(options: MergeOptions) -> MergePlan:
    """Plan a merge; reads headers only.

    Raises:
        AdapterMixError: as `merge`.
    """
    if not options.adapters:
        raise PlanError("at least one adapter is needed to merge, got none.", code="merge.no-adapter")
    sources = open_adapters(options.adapters, allow_pickle=options.allow_pickle)
    if options.model_modules:
        sources = tuple(fitted(source, options.model_modules) for source in sources)
    names = [source.name for source in sources]
    weights = resolve_weights(names, options.weights)
    if options.keep != KEEP and options.rank != "auto":
        raise PlanError(
            "--keep goes with --rank auto, and the rank is not automatic. Leave --keep out.",
            code="merge.keep-without-auto",
        )
    check(sources, allow_base_mismatch=options.allow_base_mismatch)
    plain, more = split_settings(options.options or {})
    modules = sorted(set().union(*(source.modules for source in sources)))
    overrides = tuple(make_override(entry, names, modules) for entry in (*options.places, *more))
    method = build(options.method, plain)
    check_roles(method, len(sources))
    for local in ({}, *(override.options for override in overrides)):
        check_depths(build(options.method, {**plain, **local}), depths_of(modules))
    return MergePlan(
        sources=sources,
        weights=weights,
        method=method,
        statistics=_statistics(options, method, sources),
        shape=Shape(form=options.form, rank=options.rank, keep=options.keep),
        overrides=overrides,
        fill=options.fill,
        seed=options.seed,
        checkpoint=None if options.base is None else open_checkpoint(resolve_checkpoint(options.base)),
        saved=options.saved,
        options=plain,
    )


def _statistics(options: MergeOptions, method: MergeMethod, sources: Sequence[AdapterSource]) -> tuple[Checkpoint, ...]:
    """Open the statistics files; refuse a wrong number of them."""
    paths, name = options.statistics, options.method
    measures_itself = method.is_learned and not paths
    if method.statistics is not None and len(paths) != len(sources) and not measures_itself:
        raise PlanError(
            f"method '{name}' needs one statistics file per adapter (--statistics), got {len(paths)} for "
            f"{len(sources)} adapters.",
            code="statistics.count",
        )
    if paths and method.statistics is None:
        raise PlanError(
            f"method '{name}' uses no statistics, but got {len(paths)} files. Leave them out.",
            code="statistics.unused",
        )
    files = tuple(open_tensors(path) for path in paths)
    if files:
        mismatch = options.allow_base_mismatch
        check_statistics(files, list(map(str, paths)), sources, name, allow_base_mismatch=mismatch)
    return files


def merge(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float],
    out: str | Path | None = None,
    watch: Watcher = SILENT,
    learned: Mapping[str, object] | None = None,
    **options: Unpack[MergeKeywords],
) -> MergeReport:
    r"""Merge PEFT LoRA folders into one, in delta space: $\Delta = \sum_i w_i s_i B_i A_i$ for the default method.

    Args:
        adapters: Adapter folders. Rank, alpha, rsLoRA and target modules may differ.
        weights: One per adapter; a single weight w for two adapters means w and 1 - w. Not normalised.
        out: Folder to write; None computes and reports only.
        watch: Receives progress.
        learned: Manifest entries of a method with learned weights, as its learner returned them.
        options: The other fields of `MergeOptions`.

    Returns:
        The report: rank, norm, residual, sign conflict and weights per module.

    Raises:
        AdapterFormatError: an adapter is damaged or has parts that a merge would drop.
        IncompatibleAdapters: the adapters do not belong to one base model.
        ModelError: the base model does not fit.
        PlanError: a wrong count of weights, an unknown method or option, a truncation beyond the limit.
        OutputError: the output folder exists or cannot be written.
    """
    resolved = merge_options(adapters, weights, out, options)
    device = pick_device(resolved.device)
    with ExitStack() as stack:
        if resolved.written_out is not None:
            stack.enter_context(output_lock(resolved.written_out))
        if resolved.out is not None:
            check_output(resolved.out, overwrite=resolved.overwrite)
            check_not_input(resolved.out, resolved.inputs)
        plan = _checked(make_plan(resolved), resolved, learned)
        # A weighted sum of factors is limited by reading and writing, so a GPU would only add copies.
        if resolved.device == "auto" and plan.method.is_linear:
            device = torch.device("cpu")
        plan = _for_output(plan, resolved)
        folder = None
        if resolved.written_out is not None:
            folder = stack.enter_context(whole_folder(resolved.written_out, overwrite=resolved.overwrite))
        sink = _sink(plan, resolved, folder)
        with _inputs_hashed(plan, resolved), torch_threads(_threads(plan)):
            modules = run(plan, sink, device=device, watch=watch)
        return _finished(plan, resolved, sink, modules, folder)


def _checked(plan: MergePlan, options: MergeOptions, learned: Mapping[str, object] | None) -> MergePlan:
    """Check the plan, and add the learned manifest entries."""
    if plan.method.is_learned and learned is None:
        raise PlanError(
            f"method '{plan.method.title}' must learn its weights, or measure inputs, on data first: call "
            "adaptermix.merge with base, task and train.",
            code="merge.needs-data",
        )
    if not options.allow_base_mismatch and plan.checkpoint is not None:
        check_trained_on(plan.sources, fingerprint(plan.checkpoint.path), str(options.base))
    # An adapter whose learned weight became 0 keeps its head.
    return replace(plan, entries=learned or {}, keep_heads=plan.method.is_learned)


def _for_output(plan: MergePlan, options: MergeOptions) -> MergePlan:
    """Return the plan, adjusted to the output form."""
    if plan.shape.form != "dense":
        dtype = _dtype(options)
        return replace(plan, shape=replace(plan.shape, dtype=dtype if dtype.itemsize < 4 else None))
    if plan.checkpoint is not None:
        base = untied(check_whole(plan.checkpoint), plan)
        plan = replace(plan, checkpoint=base, sources=tuple(without_copies(source, base) for source in plan.sources))
    check_dense(plan)
    return plan


def _dtype(options: MergeOptions) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, options.dtype or "float32")
    return dtype


def _threads(plan: MergePlan) -> int | None:
    """Return 1 for small products of factors, where waking other threads costs more than they save."""
    return 1 if plan.method.is_linear and plan.checkpoint is None and plan.shape.form != "dense" else None


def _sink(plan: MergePlan, options: MergeOptions, folder: Path | None) -> Sink:
    dtype = _dtype(options)
    if plan.shape.form == "dense" and plan.checkpoint is not None:
        return FullCheckpoint(plan, plan.checkpoint, folder, dtype=dtype if options.dtype else None)
    if plan.shape.form == "dense":
        return DeltaFile(plan, folder, dtype=dtype)
    if folder is not None and can_stream(plan):
        return AdapterFolder(plan, folder, dtype=dtype, compact=options.compact)
    return AdapterInMemory(plan, dtype=dtype, compact=options.compact)


def _finished(
    plan: MergePlan,
    options: MergeOptions,
    sink: Sink,
    modules: Mapping[str, ModuleReport],
    folder: Path | None,
) -> MergeReport:
    """Check the losses, write the remaining files and return the report."""
    report = merge_report(plan, options, modules, sink.file)
    (check_rounding if sink.file is None else check_residual)(plan, report, limit_of(plan, options.max_residual))
    if folder is None or options.written_out is None:
        # a dry run with `out` needs the report only
        if options.out is None and isinstance(sink, AdapterInMemory):
            return replace(report, adapter=sink.state)
        return report
    sink.finish(folder)
    if sink.file is None:
        report = replace(report, bytes=weight_bytes(folder))
    write_documents(folder, _document(plan, report) | sink.entries, name=options.written_out.name)
    return report


@contextmanager
def _inputs_hashed(plan: MergePlan, options: MergeOptions) -> Iterator[None]:
    """Hash the adapters for the manifest in a thread while the block merges them."""
    sources = plan.sources if options.written_out is not None and plan.shape.form != "dense" else ()
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashes = [pool.submit(getattr, source, "digest") for source in sources]
        yield
        for future in hashes:
            future.result()


def check_trained_on(sources: Sequence[AdapterSource], digest: str | None, reference: str) -> None:
    """Refuse a base model that differs from the one that the adapters were trained on, if hashes are available.

    Args:
        sources: The adapters.
        digest: Hash of the base model's files, if they are on disk.
        reference: Name of the base model, for messages.

    Raises:
        IncompatibleAdapters: the base models differ.
    """
    for source in sources:
        named = source.meta.base
        known = source.meta.base_fingerprint
        if known is None and named and Path(named).is_dir():
            known = fingerprint(Path(named))
        if known and digest and known != digest:
            raise IncompatibleAdapters(
                f"the base model must be the one that adapter '{source.name}' was trained on, '{named}', and the "
                f"weight files of '{reference}' differ from it. If it is the same model, pass --allow-base-mismatch.",
                code="base.mismatch",
            )


def _document(plan: MergePlan, report: MergeReport) -> JsonObject:
    base = manifest.base_entry([source.meta for source in plan.sources])
    seen = files_behind(plan.statistics)
    models = [plan.checkpoint.path] if plan.checkpoint is not None and plan.writes_checkpoint else []
    if plan.checkpoint is not None:
        base["fingerprint"] = base["fingerprint"] or fingerprint(plan.checkpoint.path)
    return manifest.manifest(
        "merge",
        plan=report.plan or {},
        base=base,
        inputs=[manifest.input_entry(s, w) for s, w in zip(plan.sources, plan.weights, strict=True)],
        fidelity=report.fidelity(),
        **{
            **manifest.inherit(plan.sources, models=models, acting=plan.has_part(report.acting), **seen),
            **plan.entries,
        },
    )
