"""Adapter folders in, one adapter folder out; no base model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from .. import manifest
from ..adapters import AdapterSource, open_adapters
from ..checkpoints import Checkpoint, open_checkpoint, open_tensors, resolve_checkpoint
from ..errors import IncompatibleAdapters, PlanError, did_you_mean
from ..files import check_not_input, check_output, whole_folder
from ..fingerprints import fingerprint
from ..methods.base import build
from ..models import pick_device
from ..output import write_documents, write_output
from ..progress import SILENT, Watcher
from ..threads import torch_threads
from .dense import check_dense, write_delta
from .execute import execute, merged_modules
from .forms import KEEP, Form, Rank, Shape
from .places import make_override, split_settings
from .plan import Fill, MergePlan, check, resolve_weights
from .report import MergeReport, ModuleReport
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
) -> MergePlan:
    """Decide a merge from headers alone; see `merge` for the arguments.

    Raises:
        AdapterMixError: as `merge`.
    """
    sources = _open(adapters, allow_pickle=allow_pickle)
    names = [source.name for source in sources]
    resolved = resolve_weights(names, weights)
    if keep != KEEP and rank != "auto":
        raise PlanError("--keep goes with --rank auto, and the rank is not automatic. Leave --keep out.")
    check(sources, allow_base_mismatch=allow_base_mismatch)
    plain, more = split_settings(options or {})
    modules = sorted(set().union(*(source.modules for source in sources)))
    overrides = tuple(make_override(place, names, modules) for place in (*places, *more))
    built = build(method, plain)
    for override in overrides:
        build(method, {**plain, **override.options})
    if built.statistics is not None and len(statistics) != len(sources):
        raise PlanError(
            f"method '{method}' needs one statistics file per adapter (--statistics), got {len(statistics)} for "
            f"{len(sources)} adapters."
        )
    if statistics and built.statistics is None:
        raise PlanError(f"method '{method}' uses no statistics, and {len(statistics)} files are given. Leave them out.")
    return MergePlan(
        sources=sources,
        weights=resolved,
        method=built,
        shape=Shape(form=form, rank=rank, keep=keep),
        overrides=overrides,
        fill=fill,
        seed=seed,
        checkpoint=_checkpoint(base),
        statistics=tuple(open_tensors(path) for path in statistics),
        saved=saved,
        options=plain,
    )


def _checkpoint(base: str | None) -> Checkpoint | None:
    return None if base is None else open_checkpoint(resolve_checkpoint(base))


def merge(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float],
    out: str | Path | None = None,
    max_residual: float = 0.1,
    dtype: str | None = None,
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
        max_residual: Refuse to write if truncation loses more than this share of the whole delta's norm.
        dtype: Storage dtype; default float32. Arithmetic is in float32 or wider, SVDs of factors in float64.
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
            adapters although they name different base models. `seed`: seed of random methods.

    Returns:
        The report: rank, norm, residual, sign conflict and weights per module.

    Raises:
        AdapterFormatError: an adapter is damaged or holds what would be lost.
        IncompatibleAdapters: the adapters do not belong to one base model.
        ModelError: the base model does not fit.
        PlanError: a wrong count of weights, an unknown method or option, a truncation beyond the limit.
        OutputError: the output folder exists or cannot be written.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise PlanError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if not 0 <= max_residual <= 1:
        raise PlanError(f"--max-residual must be in [0, 1], got {max_residual:g}.")
    place = pick_device(device)
    _check_names(plan_settings)
    if isinstance(weights, int | float):
        weights = [weights]
    if out is not None:
        check_output(Path(out), overwrite=overwrite)
        check_not_input(Path(out), [*adapters, *filter(None, [plan_settings.get("base")])])
    plan = make_plan(adapters, weights=weights, **plan_settings)
    # of a gate that has become 0 the head stays
    plan = replace(plan, entries=learned or {}, keep_heads=plan.method.is_learned)
    if plan.method.is_learned and learned is None:
        raise PlanError(
            f"method '{plan.method.title}' must learn its weights on rows of a task first: call "
            "adaptermix.merge_learned(MergeSettings(...)) with base, task and train."
        )
    if not plan_settings.get("allow_base_mismatch"):
        _check_against_base(plan, str(plan_settings.get("base")))
    # A weighted sum of factors is read and written; a GPU would only add copies.
    place = torch.device("cpu") if device == "auto" and plan.method.is_linear else place
    settings = _settings(plan, plan_settings, dtype=dtype, max_residual=max_residual)
    folder = None if out is None else Path(out)
    target = None if dry_run else folder
    if plan.shape.form == "dense":
        return _merge_dense(plan, settings, folder, target, place, overwrite=overwrite, watch=watch)
    chosen = _DTYPES[dtype or "float32"]
    with (
        _hashing(plan.sources if target is not None else ()),
        torch_threads(1 if plan.method.is_linear and plan.checkpoint is None else None),
    ):
        if target is not None and can_stream(plan):
            return _merge_streaming(plan, settings, target, chosen, overwrite=overwrite, watch=watch)
        state, modules = execute(plan, device=place, watch=watch)
    report = _report(plan, folder, modules, settings)
    _check_residual(report, _limit(plan, max_residual))
    if target is not None:
        write_output(target, state, _document(plan, report), dtype=chosen, overwrite=overwrite)
    return report


def _merge_streaming(
    plan: MergePlan, settings: Mapping[str, Any], out: Path, dtype: torch.dtype, *, overwrite: bool, watch: Watcher
) -> MergeReport:
    """Write while merging; nothing is truncated, so there is nothing to refuse afterwards."""
    modules: dict[str, ModuleReport] = {}

    def report() -> MergeReport:
        return _report(plan, out, {module: modules[module] for module in plan.modules}, settings)

    with watch.track("merge", len(plan.modules)) as advance:
        state = stream(plan, modules, advance)
        write_output(out, state, lambda: _document(plan, report()), dtype=dtype, overwrite=overwrite)
    return report()


@contextmanager
def _hashing(sources: Sequence[AdapterSource]) -> Iterator[None]:
    """Hash the inputs for the manifest while the block runs."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashes = [pool.submit(getattr, source, "digest") for source in sources]
        yield
        for found in hashes:
            found.result()


def _report(
    plan: MergePlan, out: Path | None, modules: Mapping[str, ModuleReport], settings: Mapping[str, Any]
) -> MergeReport:
    name = str(settings["method"])
    return MergeReport(out=out, method=name, weights=plan.weights, modules=modules, plan=settings, notes=plan.notes())


def _into_base(plan: MergePlan) -> bool:
    """Whether the result is a full checkpoint."""
    return plan.shape.form == "dense" and plan.checkpoint is not None


def _settings(plan: MergePlan, given: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the resolved settings, for the manifest; what is at its default and unused is left out."""
    found: dict[str, Any] = {
        "method": given.get("method", "exact"),
        "weights": list(plan.weights),
        "options": dict(plan.options),
        "rank": plan.shape.rank,
        "form": plan.shape.form,
        "fill": plan.fill,
        "saved": plan.saved,
        "dtype": more["dtype"] or (None if _into_base(plan) else "float32"),
        "max_residual": more["max_residual"],
        "allow_base_mismatch": bool(given.get("allow_base_mismatch")),
        "allow_pickle": bool(given.get("allow_pickle")),
        "places": [override.entry() for override in plan.overrides],
        "base": given.get("base"),
        "statistics": [str(path) for path in given.get("statistics") or ()],
    }
    if plan.shape.rank == "auto":
        found["keep"] = plan.shape.keep
    if plan.method.is_random:
        found["seed"] = plan.seed
    return {key: value for key, value in found.items() if value not in (None, [], {})}


def _limit(plan: MergePlan, max_residual: float) -> float:
    """Return the residual that is allowed: a share to keep that was asked for allows what it implies."""
    if plan.shape.rank != "auto":
        return max_residual
    # a hair above, since the residual is rounded
    return max(max_residual, math.sqrt(1 - plan.shape.keep) + 1e-9)


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


def _check_residual(report: MergeReport, limit: float) -> None:
    if report.residual <= limit:
        return
    worst = max(report.modules, key=lambda module: report.modules[module].residual)
    found = report.modules[worst]
    raise PlanError(
        f"truncation may lose at most {limit:.0%} of the delta's norm, and loses {report.residual:.0%} (most at "
        f"'{worst}': {found.residual:.0%} at rank {found.rank}). Choose a larger --rank, --rank auto with --keep, "
        f"--form concat or dense, or accept it with --max-residual {math.ceil(report.residual * 100) / 100:.2f}."
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
    check_dense(plan)
    if plan.checkpoint is not None:
        from ..checkpointing.adapters import weight_names

        weight_names(plan, plan.checkpoint)
    if target is None:
        modules = {module: found.report for module, found in merged_modules(plan, device=device, watch=watch)}
        return _report(plan, out, modules, settings)
    chosen = _DTYPES.get(str(settings.get("dtype")))
    with whole_folder(target, overwrite=overwrite) as folder:
        if not _into_base(plan):
            modules = write_delta(folder, plan, dtype=chosen or torch.float32, device=device, watch=watch)
        else:
            from ..checkpointing.adapters import write_into_base

            modules = write_into_base(folder, plan, dtype=chosen, device=device, watch=watch)
        report = _report(plan, out, modules, settings)
        document = _document(plan, report) | {"artifact": "checkpoint" if _into_base(plan) else "delta"}
        write_documents(folder, document, name=target.name)
    return report


def _document(plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    base = manifest.base_entry([source.meta for source in plan.sources])
    if plan.checkpoint is not None:
        base["fingerprint"] = base["fingerprint"] or fingerprint(plan.checkpoint.path)
    return manifest.manifest(
        "merge",
        plan=report.plan or {},
        base=base,
        inputs=[manifest.input_entry(s, w) for s, w in zip(plan.sources, plan.weights, strict=True)],
        fidelity=report.fidelity(),
        **{**manifest.inherit(plan.sources, acting=report.acting), **plan.entries},
    )
