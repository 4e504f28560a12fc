"""A tuned checkpoint less its base, as a plain PEFT LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from ..adapters import LINEAR, AdapterMeta, AdapterModule, AdapterState, Layout, TargetSpec
from ..adapters.paths import in_model
from ..algebra import Dense, LowRank, all_finite, least_rank
from ..algebra.lowrank import balanced
from ..algebra.randomised import decompose_exactly, frobenius
from ..analysis.selection import match_names, select
from ..checkpoints.reading import (
    FLOATS,
    base_entry,
    check_shapes,
    check_whole,
    difference,
    input_entry,
    open_model,
    task_type,
)
from ..checkpoints.writing import DTYPES
from ..errors import ModelError, OutputError, PlanError
from ..io.checkpoint_files import Checkpoint, config_of
from ..io.files import check_not_input, check_output
from ..models.base import class_modules
from ..models.devices import pick_device
from ..models.location import OUTSIDE, locations
from ..models.pretrained import split_revision
from ..options.paths import locks_out
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..publish.output import output_size, size_notes, write_output
from .extract_report import ExtractedModule, ExtractReport
from .merge_options import check_arguments
from .output_form import Shape

Rank = int | Literal["auto"]
_TABLES = {
    *(
        "wte",
        "wpe",
        "shared",
        "relative_attention_bias",
        "embed_tokens",
        "embed_positions",
        "embed_in",
        "tok_embeddings",
    ),
    *("word_embeddings", "position_embeddings", "token_type_embeddings", "entity_embeddings"),
}
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose blocks keep their weights as [in out] (transformers' Conv1D)."""
_CONV1D = {"c_attn", "q_attn", "c_proj", "c_fc"}
"""Names of the Conv1D layers; heads of the same models are [out in]."""
_ROWS = 256
_EXACT_SIDE = 1024
"""Up to this shorter side an automatic rank takes the exact SVD, which is faster than growing a guess."""


def _is_table(path: str) -> bool:
    """Whether a module is an embedding, judged by its name."""
    return path.rsplit(".", 1)[-1] in _TABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairing:
    """The tensors of the base matched with those of the tuned model, and the modules to extract.

    Args:
        keys: Name in the tuned model per name in the base.
        chosen: Modules to extract, as the base names them.
        notes: Messages about tensors without a match.
    """

    keys: Mapping[str, str]
    chosen: frozenset[str]
    notes: tuple[str, ...]


def _pair(base: Checkpoint, tuned: Checkpoint, globs: Sequence[str]) -> _Pairing:
    keys = match_names(base.tensors, tuned.tensors)
    alone = sorted((set(base.tensors) - set(keys)) | (set(tuned.tensors) - set(keys.values())))
    inside = [key for key in alone if locations([key])[key].layer != OUTSIDE]
    if not keys or inside:
        what = f"such as '{inside[0]}' in one of them only" if keys else "and share none"
        raise ModelError(
            f"{base.path} and {tuned.path} must hold the same tensors in their blocks, {what}. "
            "Give the model that was tuned and the base that it was tuned from.",
            code="extract.other-tensors",
        )
    check_shapes(base, tuned, list(keys.items()))
    candidates = [
        key.removesuffix(".weight")
        for key in keys
        if key.endswith(".weight") and len(base.tensors[key].shape) == 2 and base.tensors[key].dtype in FLOATS
    ]
    located = locations(candidates)
    chosen = select(located, modules=globs, include=globs)
    if not globs:
        chosen = [path for path in chosen if not _is_table(path)]
    if not chosen:
        raise ModelError(
            f"{base.path} and {tuned.path} must share float matrices inside their blocks, and share none. "
            "Name others with --modules, or give the models in whole precision.",
            code="extract.no-matrices",
        )
    notes = (f"in one of the two models only, and left out: {', '.join(alone[:4])}",) if alone else ()
    return _Pairing(keys=keys, chosen=frozenset(chosen), notes=notes)


def _factors(delta: Tensor, rank: Rank, keep: float, *, exact: bool) -> tuple[LowRank, float]:
    """Return the best or nearly best approximation, and the bound on its excess."""
    if not exact and (rank != "auto" or min(delta.shape) > _EXACT_SIDE):
        formed = Shape(form="lowrank", rank=rank, keep=keep).apply(Dense(w=delta), fallback=1, largest=None)
        if not isinstance(formed.update, LowRank):
            raise TypeError("a form of a rank gives factors")
        return formed.update, formed.excess
    u, sigma, vh = decompose_exactly(delta)
    chosen = least_rank(sigma, keep) if rank == "auto" else min(rank, len(sigma))
    return balanced(u, sigma, vh, rank=chosen, dtype=delta.dtype), 0.0


def _lost(delta: Tensor, low: LowRank) -> float:
    """Return the norm of the approximation error, computed a few rows at a time."""
    parts = zip(torch.split(delta, _ROWS), torch.split(low.b, _ROWS), strict=True)
    a = low.a.to(delta)
    return math.hypot(*(float(torch.linalg.vector_norm(d - b.to(d) @ a, dtype=torch.float64)) for d, b in parts))


def _targets(modules: Iterable[str], base: Checkpoint) -> TargetSpec:
    """Return target names that match exactly these modules: last parts of paths if unambiguous, else whole paths."""
    chosen = set(modules)
    paths = {key.rpartition(".")[0] for key in base.tensors}
    containers = {part for path in paths for part in path.split(".")[:-1]}
    names: set[str] = set()
    for path in chosen:
        name = path.rsplit(".", 1)[-1]
        alike = {other for other in paths if other.rsplit(".", 1)[-1] == name}
        names.add(name if alike <= chosen and name not in containers else path)
    return TargetSpec(modules=tuple(sorted(names)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """Settings of the factorisation of each module."""

    rank: Rank
    keep: float
    exact: bool
    dtype: torch.dtype
    device: torch.device
    transposed: bool

    def module(self, path: str, delta: Tensor) -> tuple[LowRank, ExtractedModule]:
        """Return the factors of one module in their storage dtype, and their report."""
        conv = self.transposed and path.rsplit(".", 1)[-1] in _CONV1D
        turned = (delta.T.contiguous() if conv or _is_table(path) else delta).to(self.device)
        low, excess = _factors(turned, self.rank, self.keep, exact=self.exact)
        low = low.to(self.dtype)
        if not (all_finite(low.a) and all_finite(low.b)):
            raise OutputError(
                f"the factors of module '{path}' must be finite in {str(self.dtype).removeprefix('torch.')}, and "
                "overflow it. Choose a wider dtype.",
                code="write.overflow",
            )
        norm = frobenius(turned)
        report = ExtractedModule(rank=low.rank, norm=norm, residual=_lost(turned, low) / norm, excess=excess)
        return LowRank(b=low.b.cpu(), a=low.a.cpu()), report


def _walk(
    base: Checkpoint, tuned: Checkpoint, pairing: _Pairing, request: _Request, watch: Watcher
) -> tuple[dict[str, LowRank], dict[str, ExtractedModule], dict[str, float]]:
    """Return updates and reports per module, and the norms of the differences that are left out."""
    updates: dict[str, LowRank] = {}
    reports: dict[str, ExtractedModule] = {}
    left_out: dict[str, float] = {}
    with watch.track("extract", len(pairing.keys)) as advance:
        for key, theirs in pairing.keys.items():
            delta = difference(base.load(key), tuned.load(theirs))
            if delta is not None:
                norm = frobenius(delta.reshape(len(delta) if delta.ndim else 1, -1))
                if not math.isfinite(norm):
                    raise ModelError(
                        f"every weight must be finite, and '{key}' of {base.path} or {tuned.path} is not. "
                        "Fetch or save it again.",
                        code="base.not-finite",
                    )
                path = key.removesuffix(".weight")
                if path in pairing.chosen:
                    updates[path], reports[path] = request.module(path, delta)
                else:
                    left_out[key] = norm
            advance(1, key)
    return updates, reports, left_out


class ExtractKeywords(TypedDict, total=False):
    """Further keyword arguments of `extract`.

    Args:
        exact: Use the exact SVD instead of the verified randomised one, whose residual is at most 1 % larger.
        dtype: Storage dtype of the factors, default float32; differences are in float32, or in float64 where a file is.
        compact: Keep each module's own rank; default is the largest rank for all, by zeros.
        max_residual: Refuse to write if more than this share of the norm is lost over the modules of the adapter.
        device: `auto`, `cpu` (the default), `cuda` or `cuda:N`; where to decompose.
        overwrite: Replace an existing output folder.
        dry_run: Do everything but write.
    """

    exact: bool
    dtype: str
    compact: bool
    max_residual: float | None
    device: str
    overwrite: bool
    dry_run: bool


@locks_out
def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    out: str | Path,
    rank: Rank,
    keep: float = 0.99,
    modules: Sequence[str] = (),
    watch: Watcher = SILENT,
    **more: Unpack[ExtractKeywords],
) -> ExtractReport:
    r"""Write the difference between two checkpoints as a LoRA: per module the best $BA$ of a rank for $W - W_0$.

    Embeddings and heads, biases and norms are left out, and the report says what share of the whole difference goes
    with them. Modules that do not differ are left out too.

    Args:
        base: Folder or Hub id of the base model.
        tuned: Folder or Hub id of the model tuned from it; its names may have a prefix that the base's lack.
        out: Folder to write.
        rank: Rank of every module, or "auto" for the least that keeps `keep`.
        keep: Share of each module's squared norm that an automatic rank keeps.
        modules: Globs over module paths or their last parts; none means every matrix inside the blocks. Embeddings and
            heads are taken where a glob names them.
        watch: Receives progress.
        more: See `ExtractKeywords`.

    Shapes: per module, W and W_0 are [out in] and give B [out r] and A [r in], both with the roots of the singular
        values.

    Raises:
        ModelError: a model is missing or damaged, the two do not belong together, or nothing differs.
        PlanError: a glob meets nothing, an impossible rank, or more is lost than allowed.
        OutputError: the output folder exists or cannot be written, or a factor overflows its dtype.

    Reference: Eckart and Young, 1936; as LoRA: Hu et al., 2021, arXiv 2106.09685, section 4.1.
    """
    check_arguments(more, ExtractKeywords)
    exact, dtype, compact = more.get("exact", False), more.get("dtype", "float32"), more.get("compact", False)
    max_residual, overwrite = more.get("max_residual"), more.get("overwrite", False)
    folder = Path(out)
    _check_numbers(rank, keep, dtype, max_residual)
    check_output(folder, overwrite=overwrite)
    check_not_input(folder, [base, tuned])
    first, second = check_whole(open_model(base)), check_whole(open_model(tuned))
    pairing = _pair(first, second, modules)
    config = config_of(first)
    transposed = config.get("model_type") in _TRANSPOSED
    request = _Request(
        rank=rank,
        keep=keep,
        exact=exact,
        dtype=DTYPES[dtype],
        device=pick_device(more.get("device", "cpu")),
        transposed=transposed,
    )
    updates, reports, left_out = _walk(first, second, pairing, request, watch)
    notes = (*pairing.notes, *_tied_note(updates, first))
    report = ExtractReport(out=folder, rank=rank, modules=reports, left_out=left_out, notes=notes)
    _check_result(report, max_residual)
    meta = AdapterMeta(
        base=split_revision(str(base))[0],
        revision=split_revision(str(base))[1],
        task_type=task_type(config),
        targets=_targets(updates, first),
        fan_in_fan_out=transposed,
    )
    state = _named(meta, updates, first)
    size = output_size(state, dtype=DTYPES[dtype], compact=compact)["bytes"]
    report = replace(report, bytes=size, notes=(*notes, *size_notes(size, first.path)))
    if more.get("dry_run"):
        return report
    settings = {"rank": rank, "keep": keep if rank == "auto" else None, "exact": exact, "dtype": dtype}
    plan = {**settings, "modules": list(modules) or None, "max_residual": max_residual}
    plan |= {"compact": compact or None}
    document = manifest.manifest(
        "extract",
        plan={key: value for key, value in plan.items() if value is not None},
        base=base_entry(base, first),
        inputs=[input_entry(tuned, second, 1.0, watch=watch)],
        fidelity=report.fidelity(),
        **manifest.inherit((), models=[second.path]),
    )
    write_output(folder, state, document, dtype=DTYPES[dtype], compact=compact, overwrite=overwrite)
    return report


def _named(meta: AdapterMeta, updates: Mapping[str, LowRank], base: Checkpoint) -> AdapterState:
    """Return the adapter with the paths of the class that PEFT adapts, where the base's files have other names."""
    names = in_model(updates, class_modules(base.path))
    if any(old != new for old, new in names.items()):
        meta = replace(meta, targets=TargetSpec(modules=tuple(sorted(names.values()))))
    return AdapterState(
        meta=meta,
        modules={
            names[path]: AdapterModule(update=update, layout=Layout(kind="embedding") if _is_table(path) else LINEAR)
            for path, update in updates.items()
        },
    )


def _check_numbers(rank: Rank, keep: float, dtype: str, max_residual: float | None) -> None:
    # the rest is checked by Shape
    Shape(form="lowrank", rank=rank, keep=keep)
    if dtype not in DTYPES:
        raise PlanError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.", code="option.dtype")
    if max_residual is not None and not 0 <= max_residual <= 1:
        raise PlanError(f"--max-residual must be in [0, 1], got {max_residual:g}.", code="option.max-residual")


def _tied_note(updates: Mapping[str, LowRank], base: Checkpoint) -> tuple[str, ...]:
    tables = sorted(path for path in updates if _is_table(path) and "lm_head.weight" not in base.tensors)
    if not tables or config_of(base).get("tie_word_embeddings") is False:
        return ()
    return (f"the head may be tied to '{tables[0]}', and PEFT adds a LoRA of the embedding to the embedding alone",)


def _check_result(report: ExtractReport, limit: float | None) -> None:
    if not report.modules:
        left = f" ({len(report.left_out)} other tensors do)" if report.left_out else ""
        raise ModelError(
            f"at least one module that is to be extracted must differ between the two models, and none does{left}. "
            "Check --base and --tuned, or name other modules with --modules.",
            code="extract.no-difference",
        )
    if limit is not None and report.residual > limit:
        worst = max(report.modules, key=lambda path: report.modules[path].residual)
        least = report.modules[worst]
        raise PlanError(
            f"the factors may lose at most {limit:.0%} of the difference's norm, and lose {report.residual:.0%} (most "
            f"at '{worst}': {least.residual:.0%} at rank {least.rank}). Choose a larger --rank, --rank auto with "
            f"--keep, or a larger --max-residual.",
            code="extract.residual",
        )
