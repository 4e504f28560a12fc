"""Adapter folders in, one adapter folder out; no base model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from ..adapters import AdapterSource, AdapterState, open_adapters
from ..adapters.convert import without_copies
from ..adapters.paths import fitted
from ..errors import IncompatibleAdapters, PlanError, did_you_mean
from ..io.checkpoint_files import Checkpoint, open_checkpoint, open_tensors, resolve_checkpoint
from ..io.files import check_not_input, check_output, whole_folder
from ..io.fingerprints import fingerprint
from ..io.threads import torch_threads
from ..methods.base import build, check_depths, check_roles
from ..models.base import pick_device
from ..options.paths import locks_out
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..publish.output import OutputForm, output_size, weight_bytes, write_documents, write_output
from .dense import check_dense, dense_reports, into_base, write_delta
from .execute import execute
from .limits import check_residual, check_rounding, limit_of
from .output_form import KEEP, Form, Rank, Shape
from .overrides import depths_of, make_override, split_settings
from .plan import Fill, MergePlan, check, resolve_weights
from .recorded import merge_report, merge_settings
from .report import MergeReport, ModuleReport
from .statistics import check_statistics, files_behind
from .streaming import can_stream, stream

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _open(adapters: Sequence[str | Path], *, allow_pickle: bool) -> tuple[AdapterSource, ...]:
    if not adapters:
        raise PlanError("at least one adapter is needed to merge, got none.")
    return open_adapters(adapters, allow_pickle=allow_pickle)


def make_plan(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float],
    method: str = "exact",
    options: Mapping[str, Any] | None = None,
    places: Sequence[Mapping[str, Any]] = (),
    fill: Fill = "weight",
    form: Form | None = None,
    rank: Rank | None = None,
    keep: float = KEEP,
    base: str | None = None,
    saved: str | int = "refuse",
    statistics: Sequence[str | Path] = (),
    allow_pickle: bool = False,
    allow_base_mismatch: bool = False,
    seed: int = 0,
    model_modules: Collection[str] = (),
) -> MergePlan:
    """Decide a merge from headers alone; see `merge` for the arguments.

    Raises:
        AdapterMixError: as `merge`.
    """
    sources = _open(adapters, allow_pickle=allow_pickle)
    if model_modules:
        sources = tuple(fitted(source, model_modules) for source in sources)
    names = [source.name for source in sources]
    resolved = resolve_weights(names, weights)
    if keep != KEEP and rank != "auto":
        raise PlanError("--keep goes with --rank auto, and the rank is not automatic. Leave --keep out.")
    check(sources, allow_base_mismatch=allow_base_mismatch)
    plain, more = split_settings(options or {})
    modules = sorted(set().union(*(source.modules for source in sources)))
    overrides = tuple(make_override(place, names, modules) for place in (*places, *more))
    built = build(method, plain)
    check_roles(built, len(sources))
    for local in ({}, *(override.options for override in overrides)):
        check_depths(build(method, {**plain, **local}), depths_of(modules))
    measures_itself = built.is_learned and not statistics
    if built.statistics is not None and len(statistics) != len(sources) and not measures_itself:
        raise PlanError(
            f"method '{method}' needs one statistics file per adapter (--statistics), got {len(statistics)} for "
            f"{len(sources)} adapters."
        )
    if statistics and built.statistics is None:
        raise PlanError(f"method '{method}' uses no statistics, and {len(statistics)} files are given. Leave them out.")
    files = tuple(open_tensors(path) for path in statistics)
    if files:
        check_statistics(files, list(map(str, statistics)), sources, method, allow_base_mismatch=allow_base_mismatch)
    return MergePlan(
        sources=sources,
        weights=resolved,
        method=built,
        shape=Shape(form=form, rank=rank, keep=keep),
        overrides=overrides,
        fill=fill,
        seed=seed,
        checkpoint=_checkpoint(base),
        statistics=files,
        saved=saved,
        options=plain,
    )


def _checkpoint(base: str | None) -> Checkpoint | None:
    return None if base is None else open_checkpoint(resolve_checkpoint(base))


@locks_out
def merge(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float],
    out: str | Path | None = None,
    max_residual: float = 0.1,
    dtype: str | None = None,
    compact: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    watch: Watcher = SILENT,
    learned: Mapping[str, Any] | None = None,
    **plan_settings: Any,
) -> MergeReport:
    r"""Merge PEFT LoRA folders into one, in delta space: $\Delta = \sum_i w_i s_i B_i A_i$ for the default method.

    Args:
        adapters: Adapter folders. Rank, alpha, rsLoRA and target modules may differ.
        weights: One per adapter; a single weight w for two adapters means w and 1 - w. Not normalised.
        out: Folder to write; None computes and reports only.
        max_residual: Refuse to write if truncation and rounding lose more than this share of the whole delta's norm.
        dtype: Storage dtype; default float32. Arithmetic is in float32 or wider, SVDs of factors in float64.
        compact: Keep each module's own rank (`rank_pattern`); default is one rank for all modules, by zeros, which
            programs that ignore patterns read rightly too.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; where methods compute.
        overwrite: Replace an existing output folder.
        dry_run: Do everything but write.
        watch: Receives progress.
        learned: Entries of the manifest of a method whose weights are learned, from what learned them.
        plan_settings: `method`: name of a merge method. `options`: its hyper-parameters; `KEY@GLOB` and
            `KEY@layers:FIRST-LAST` hold at a place only, KEY also being `weights` or `curve`. `places`: the same as a
            list of mappings. `fill`: "one" gives an adapter that acts alone on a module the weight 1. `form`, `rank`,
            `keep`: see `forms.Shape`. `base`: base model's folder or Hub id, for DoRA, PiSSA and OLoRA. `saved`: what
            becomes of fully trained tensors; see `extras.merge_saved`. `statistics`: one safetensors file per adapter
            with a tensor per module path. `allow_pickle`: read `adapter_model.bin` too. `allow_base_mismatch`: merge
            adapters although they name different base models. `seed`: seed of random methods. `model_modules`: paths of
            all modules of the base model's class; the result gets these paths.

    Returns:
        The report: rank, norm, residual, sign conflict and weights per module.

    Raises:
        AdapterFormatError: an adapter is damaged or holds what would be lost.
        IncompatibleAdapters: the adapters do not belong to one base model.
        ModelError: the base model does not fit.
        PlanError: a wrong count of weights, an unknown method or option, a truncation beyond the limit.
        OutputError: the output folder exists or cannot be written.
    """
    _check_storage(dtype, max_residual, compact=compact, form=plan_settings.get("form"))
    place = pick_device(device)
    _check_names(plan_settings)
    if isinstance(weights, int | float):
        weights = [weights]
    if out is not None:
        check_output(Path(out), overwrite=overwrite)
        check_not_input(
            Path(out), [*adapters, *filter(None, [plan_settings.get("base")]), *(plan_settings.get("statistics") or ())]
        )
    plan = make_plan(adapters, weights=weights, **plan_settings)
    # of a gate that has become 0 the head stays
    plan = replace(plan, entries=learned or {}, keep_heads=plan.method.is_learned)
    if plan.method.is_learned and learned is None:
        raise PlanError(
            f"method '{plan.method.title}' must learn its weights, or measure inputs, on data first: call "
            "adaptermix.merge_learned(MergeSettings(...)) with base, and task and train."
        )
    if not plan_settings.get("allow_base_mismatch"):
        _check_against_base(plan, str(plan_settings.get("base")))
    # A weighted sum of factors is read and written; a GPU would only add copies.
    place = torch.device("cpu") if device == "auto" and plan.method.is_linear else place
    settings = merge_settings(plan, plan_settings, dtype=dtype, max_residual=max_residual, compact=compact)
    folder = None if out is None else Path(out)
    target = None if dry_run else folder
    if plan.shape.form == "dense":
        return _merge_dense(plan, settings, folder, target, place, overwrite=overwrite, watch=watch)
    stored = OutputForm(dtype=_DTYPES[dtype or "float32"], compact=compact, overwrite=overwrite)
    return _merge_factors(plan, settings, folder, target, place, stored=stored, watch=watch)


def _merge_factors(
    plan: MergePlan,
    settings: Mapping[str, Any],
    out: Path | None,
    target: Path | None,
    device: torch.device,
    *,
    stored: OutputForm,
    watch: Watcher,
) -> MergeReport:
    dtype = stored["dtype"]
    plan = replace(plan, shape=replace(plan.shape, dtype=dtype if dtype.itemsize < 4 else None))

    def report_of(state: AdapterState, modules: Mapping[str, ModuleReport]) -> MergeReport:
        size = output_size(state, dtype=dtype, compact=stored["compact"])
        found = merge_report(plan, out, modules, settings, size)
        check_residual(plan, found, limit_of(plan, settings["max_residual"]))
        return found

    with (
        _hashing(plan.sources if target is not None else ()),
        torch_threads(1 if plan.method.is_linear and plan.checkpoint is None else None),
    ):
        if target is not None and can_stream(plan):
            return _merge_streaming(plan, target, report_of, stored, watch)
        state, modules = execute(plan, device=device, watch=watch)
    report = report_of(state, modules)
    if target is not None:
        write_output(target, state, _document(plan, report), **stored)
    return report


def _merge_streaming(
    plan: MergePlan,
    out: Path,
    report_of: Callable[[AdapterState, Mapping[str, ModuleReport]], MergeReport],
    stored: OutputForm,
    watch: Watcher,
) -> MergeReport:
    """Write while merging; what rounding loses is known before the folder appears."""
    modules: dict[str, ModuleReport] = {}

    def report() -> MergeReport:
        return report_of(state, {module: modules[module] for module in plan.modules})

    with watch.track("merge", len(plan.modules)) as advance:
        state = stream(plan, modules, advance)
        write_output(out, state, lambda: _document(plan, report()), **stored)
    return report()


@contextmanager
def _hashing(sources: Sequence[AdapterSource]) -> Iterator[None]:
    """Hash the inputs for the manifest while the block runs."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashes = [pool.submit(getattr, source, "digest") for source in sources]
        yield
        for found in hashes:
            found.result()


def _check_storage(dtype: str | None, max_residual: float, *, compact: bool, form: Any) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise PlanError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if not 0 <= max_residual <= 1:
        raise PlanError(f"--max-residual must be in [0, 1], got {max_residual:g}.")
    if compact and form == "dense":
        raise PlanError("--compact is about the ranks of an adapter, and --form dense has none. Leave one of them out.")


def _check_names(given: Mapping[str, Any]) -> None:
    known = [name for name in signature(make_plan).parameters if name not in ("adapters", "weights")]
    for name in given:
        if name not in known:
            raise PlanError(f"unknown argument {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def _check_against_base(plan: MergePlan, reference: str) -> None:
    """Refuse a base model that is not the one the adapters were trained on, where files tell.

    Raises:
        IncompatibleAdapters: it is another.
    """
    if plan.checkpoint is not None:
        check_trained_on(plan.sources, fingerprint(plan.checkpoint.path), reference)


def check_trained_on(sources: Sequence[AdapterSource], given: str | None, reference: str) -> None:
    """Refuse a base model that is not the one that adapters were trained on, where files tell.

    Args:
        sources: The adapters.
        given: Hash of the base model's files, if they are on disk.
        reference: What the base model is called.

    Raises:
        IncompatibleAdapters: it is another.
    """
    for source in sources:
        named = source.meta.base
        known = source.meta.base_fingerprint
        if known is None and named and Path(named).is_dir():
            known = fingerprint(Path(named))
        if known and given and known != given:
            raise IncompatibleAdapters(
                f"the base model must be the one that adapter '{source.name}' was trained on, '{named}', and the "
                f"weight files of '{reference}' differ from it. If it is the same model, pass --allow-base-mismatch."
            )


def _merge_dense(
    plan: MergePlan,
    settings: Mapping[str, Any],
    out: Path | None,
    target: Path | None,
    device: torch.device,
    *,
    overwrite: bool,
    watch: Watcher,
) -> MergeReport:
    if plan.checkpoint is not None:
        from .into_base import untied, weight_names

        base = untied(plan.checkpoint, plan)
        plan = replace(plan, checkpoint=base, sources=tuple(without_copies(source, base) for source in plan.sources))
    check_dense(plan)
    if plan.checkpoint is not None:
        weight_names(plan, plan.checkpoint)
    chosen = _DTYPES.get(str(settings.get("dtype")))
    limit = limit_of(plan, settings["max_residual"])
    if target is None:
        modules = dense_reports(plan, chosen, device, watch)
        report = merge_report(plan, out, modules, settings)
        check_rounding(plan, report, limit)
        return report
    with whole_folder(target, overwrite=overwrite) as folder:
        if not into_base(plan):
            modules = write_delta(folder, plan, dtype=chosen or torch.float32, device=device, watch=watch)
        else:
            from .into_base import write_into_base

            modules = write_into_base(folder, plan, dtype=chosen, device=device, watch=watch)
        report = replace(merge_report(plan, out, modules, settings), bytes=weight_bytes(folder))
        check_rounding(plan, report, limit)
        document = _document(plan, report) | {"artifact": "checkpoint" if into_base(plan) else "delta"}
        write_documents(folder, document, name=target.name)
    return report


def _models(plan: MergePlan) -> list[Path]:
    """Return the folder of the base model, if it goes into the result."""
    return [plan.checkpoint.path] if plan.checkpoint is not None and into_base(plan) else []


def _document(plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    base = manifest.base_entry([source.meta for source in plan.sources])
    seen = files_behind(plan.statistics)
    if plan.checkpoint is not None:
        base["fingerprint"] = base["fingerprint"] or fingerprint(plan.checkpoint.path)
    return manifest.manifest(
        "merge",
        plan=report.plan or {},
        base=base,
        inputs=[manifest.input_entry(s, w) for s, w in zip(plan.sources, plan.weights, strict=True)],
        fidelity=report.fidelity(),
        **{
            **manifest.inherit(plan.sources, models=_models(plan), acting=plan.has_part(report.acting), **seen),
            **plan.entries,
        },
    )
