"""Singular-value scaling between two models, one pair of weights at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from ..algebra import concatenate
from ..algebra.spectra import dense_singular_values, spectral_distance, spectral_norm
from ..errors import IncompatibleAdapters, ModelError, OutputError, PlanError
from ..io.files import write_whole
from ..models.devices import pick_device
from ..models.location import OUTSIDE, ModuleLocation, locations
from ..options.paths import check_file_not_input, check_replaceable
from ..progress import SILENT, Watcher
from .figures import check_file
from .selection import Globs, match_names, select
from .spectrum_inputs import Updates, Weights, beyond_factors, open_side
from .spectrum_report import Scaling, SpectrumReport

Side = Weights | Updates
Measure = Callable[[str, str], Scaling]


def spectrum(
    model_a: str | Path,
    model_b: str | Path | Sequence[str | Path],
    *,
    csv: str | Path | None = None,
    table: str | Path | None = None,
    device: str = "auto",
    watch: Watcher = SILENT,
    **chosen: Unpack[Globs],
) -> SpectrumReport:
    r"""Compare the singular values of a base and of other models, weight by weight.

    For each matrix that both have, with its singular values $\sigma$ in descending order:

        $\|\sigma_A\|_2$, $\|\sigma_B\|_2$, their ratio, and $d = \|\sigma_B - \sigma_A\|_2$

    and $\|W_B - W_A\|_F \ge d$ with its stable rank. d = 0 does not mean equal weights: d of rotated weights is 0.

    Two checkpoints are compared directly. For a checkpoint and an adapter, W is compared with $W + \Delta$ (before any
    rounding to the dtype of the file), for the adapter's modules. For two adapters, the singular values of the deltas
    are compared, computed from the factors. Only a few matrices are in memory at a time. Singular values are exact in
    float64: by an SVD up to a shorter side of 1024, beyond that (and for embeddings) from the Gram matrix, with errors
    of at most about 1e-8 of the largest one.

    Args:
        model_a: The base: checkpoint folder, adapter folder, or Hub id, optionally with @REVISION.
        model_b: One or several others, each of the same kind, or an adapter of the base.
        csv: File for a table with one row per model and module.
        table: File for the table of layers and models, `.md` for Markdown or `.csv`; see `ScalingTable`.
        device: Device of the computation: auto, cpu, cuda or cuda:N.
        watch: Receives progress.
        chosen: The modules to compare; as in `selection.select`. Default all matrices inside the blocks.

    Differs from the paper: it does not define "norm" and "pairwise distance"; both are Euclidean here, which is
    consistent with all of its numbers.

    Raises:
        ModelError: a model is missing or damaged, or the two share no weight.
        IncompatibleAdapters: the adapter does not match the checkpoint.
        PlanError: a glob matches no module, or the adapter is the first model.
        OutputError: an output file cannot be written.

    Reference: Ji et al., Can Machine Translation Bridge Multilingual Pretraining and Cross-lingual Transfer Learning?,
    LREC-COLING 2024, arXiv 2403.16777, appendix B.2 and table 5.
    """
    others = [model_b] if isinstance(model_b, str | Path) else list(model_b)
    _check_outputs(csv, table, [model_a, *others])
    target = pick_device(device)
    base = open_side(str(model_a))
    sides = [open_side(str(other)) for other in others]
    reading = _Reading(target)
    pending = [_pending(base, side, reading, target, chosen) for side in sides]
    paths = dict.fromkeys(path for each in pending for path in each.locations)
    with watch.track("spectrum", sum(len(each.locations) for each in pending)) as advance:
        for path in paths:  # the weight of the base is decomposed once for all models
            for each in pending:
                if path in each.locations:
                    each.numbers[path] = each.measure(path, each.pairs[path])
                    advance(1, path)
    reports = [each.report(base.reference) for each in pending]
    report = replace(reports[0], others=tuple(reports[1:]))
    if csv is not None:
        write_whole(Path(csv), report.csv())
    if table is not None:
        form = report.table().csv() if Path(table).suffix == ".csv" else report.table().markdown()
        write_whole(Path(table), form.encode())
    return report


def _check_outputs(csv: str | Path | None, table: str | Path | None, models: Sequence[str | Path]) -> None:
    """Refuse files that could not be written, before any work is done.

    Raises:
        OutputError: there is no such folder, or the file is an input or another file that must not be replaced.
    """
    for form, path in (("csv", csv), ("table", table)):
        if path is not None:
            check_file(Path(path), f"--{form}")
            check_file_not_input(Path(path), models)
            check_replaceable(Path(path), form)
    if table is not None and Path(table).suffix not in (".md", ".csv"):
        raise OutputError(
            f"--table must be a file of Markdown or CSV, such as table.md or table.csv, got {str(table)!r}.",
            code="spectrum.table-form",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """The comparison of the base with one model, before and while its numbers are computed.

    Args:
        side: The model.
        compared: Kind of comparison in words.
        measure: Computes the numbers of a pair of paths.
        pairs: Path in the model of each matrix of the base.
        locations: Locations of the selected paths of the base, in the order of the model.
        notes: Reasons for missing numbers.
        numbers: The numbers so far.
    """

    side: Side
    compared: str
    measure: Measure
    pairs: Mapping[str, str]
    locations: Mapping[str, ModuleLocation]
    notes: tuple[str, ...]
    numbers: dict[str, Scaling] = field(default_factory=dict)

    def report(self, base: str) -> SpectrumReport:
        """Return the report once all numbers are there."""
        return SpectrumReport(
            a=base,
            b=self.side.reference,
            compared=self.compared,
            modules={path: self.numbers[path] for path in self.locations},
            locations=self.locations,
            notes=self.notes,
        )


def _pending(base: Side, side: Side, reading: _Reading, device: torch.device, chosen: Globs) -> _Pending:
    """Match a model's matrices with those of the base, and select those to compare.

    Raises:
        AdapterMixError: as `spectrum`.
    """
    compared, measure = _measure(base, side, reading, device)
    pairs, notes = _pairs(base, side)
    notes += tuple(
        note for each in (base, side) if isinstance(each, Updates) for note in beyond_factors(each.source.meta)
    )
    located = locations(pairs)
    paths = select(located, **chosen)
    if not paths:
        raise ModelError(
            f"{base.reference} and {side.reference} must share a selected matrix inside their blocks, and share no "
            "such matrix. Select others with --include, or exclude fewer.",
            code="spectrum.no-shared-selection",
        )
    return _Pending(
        side=side,
        compared=compared,
        measure=measure,
        pairs=pairs,
        locations={path: located[path] for path in paths},
        notes=notes,
    )


class _Reading:
    """Reads the base's weights with their singular values; the last one stays in memory for the next model.

    Args:
        device: Device of the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._path, self._last = "", (torch.empty(0), torch.empty(0))

    def __call__(self, base: Weights, path: str) -> tuple[Tensor, Tensor]:
        """Return a weight of the base and its singular values, descending."""
        if self._path != path:
            weight = base.load(path).to(self._device)
            self._path, self._last = path, (weight, dense_singular_values(weight))
        return self._last


def _pairs(a: Side, b: Side) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the path in B of each matrix of A, and notes about matrices without a counterpart.

    Raises:
        IncompatibleAdapters: a module of the adapter is not in the base, or has another shape.
        ModelError: the models share no matrix.
    """
    pairs = match_names(a.matrices, b.matrices)
    notes = []
    onto_base = isinstance(a, Weights) and isinstance(b, Updates)
    if isinstance(a, Weights) and isinstance(b, Updates):
        notes += _without_matrix(a, b, set(b.matrices) - set(pairs.values()))
    other_shape = [path for path, theirs in pairs.items() if not _fits(a, path, b, theirs)]
    if onto_base and other_shape:
        path = other_shape[0]
        raise IncompatibleAdapters(
            f"module '{path}': the adapter's update is {list(b.matrices[pairs[path]])}, the weight of {a.reference} "
            f"{list(a.matrices[path])}. The adapter was trained on another base model.",
            code="base.update-shape",
        )
    kept = {path: theirs for path, theirs in pairs.items() if path not in set(other_shape)}
    if not kept:
        names = " and ".join(f"'{next(iter(side.matrices), '')}'" for side in (a, b))
        raise ModelError(
            f"{a.reference} and {b.reference} must share matrices of one name and shape, and share none "
            f"(they hold {names}, for example). Compare models of one architecture.",
            code="spectrum.no-shared-matrix",
        )
    if other_shape:
        notes.append(f"{len(other_shape)} matrices differ in shape and are left out, such as '{other_shape[0]}'")
    alone = 0 if onto_base else len(a.matrices) + len(b.matrices) - 2 * len(pairs)
    if alone:
        notes.append(f"{alone} matrices are in one of the two only and are left out")
    return kept, tuple(notes)


def _without_matrix(a: Weights, b: Updates, missing: set[str]) -> list[str]:
    """Return a note about the adapter's modules that the base stores in another form: as convolutions, or tied.

    Raises:
        IncompatibleAdapters: the base lacks a module inside the blocks.
    """
    other_sorts = {key.removesuffix(".weight") for key in a.checkpoint.tensors} - set(a.matrices)
    unknown = missing - set(match_names(missing, other_sorts))
    located = locations(sorted(unknown))
    strange = next((path for path, location in located.items() if location.layer != OUTSIDE), None)
    if strange is not None:
        raise IncompatibleAdapters(
            f"every module of {b.reference} must be a weight of {a.reference}, and '{strange}' is not. It was trained "
            "on another base model.",
            code="base.no-module",
        )
    if not missing:
        return []
    return [
        f"{len(missing)} modules of the adapter are not matrices in the base's files (convolutions, tied heads) and "
        f"are left out, such as '{min(missing)}'"
    ]


def _fits(a: Side, path: str, b: Side, theirs: str) -> bool:
    """Return whether two shapes can be of one matrix, which a file may store transposed."""
    one, other = a.matrices[path], b.matrices[theirs]
    may_be_transposed = isinstance(b, Weights)
    if isinstance(a, Weights) and isinstance(b, Updates):
        # Conv1D, and embeddings, whose updates PEFT stores as [dim num].
        may_be_transposed = b.source.meta.fan_in_fan_out or locations([path])[path].layer == OUTSIDE
    return one == other or (may_be_transposed and one == other[::-1])


def _measure(a: Side, b: Side, reading: _Reading, device: torch.device) -> tuple[str, Measure]:
    """Return the kind of comparison in words, and the function that compares one pair of paths.

    Raises:
        PlanError: the adapter is the first model.
    """
    if isinstance(a, Updates) and isinstance(b, Updates):
        return "adapters", lambda ours, theirs: _of_deltas(a, b, ours, theirs)
    if isinstance(a, Weights) and isinstance(b, Updates):
        return "base and base with adapter", lambda ours, theirs: _of_update(a, b, ours, theirs, reading(a, ours))
    if isinstance(a, Weights) and isinstance(b, Weights):
        return "checkpoints", lambda ours, theirs: _of_weights(reading(a, ours), b.load(theirs).to(device))
    raise PlanError(
        f"the base must be the first model, and {a.reference} is an adapter. Put {b.reference} first.",
        code="spectrum.order",
    )


def _unchanged(norm: float) -> Scaling:
    return Scaling(norm_a=norm, norm_b=norm, distance=0.0, difference_norm=0.0, stable_rank=0.0)


def _of_weights(base: tuple[Tensor, Tensor], second: Tensor) -> Scaling:
    first, sigma = base
    dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = first.to(dtype), second.to(dtype)
    second = second if second.shape == first.shape else second.T
    norm = float(torch.linalg.vector_norm(sigma))
    if torch.equal(first, second):
        return _unchanged(norm)
    other = dense_singular_values(second)
    difference = second - first
    del first, second
    length = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    largest = spectral_norm(difference)
    return Scaling(
        norm_a=norm,
        norm_b=float(torch.linalg.vector_norm(other)),
        distance=spectral_distance(sigma, other),
        difference_norm=length,
        stable_rank=(length / largest) ** 2 if largest > 0 else 0.0,
    )


def _of_update(a: Weights, b: Updates, ours: str, theirs: str, base: tuple[Tensor, Tensor]) -> Scaling:
    frame = b.frame(theirs, b.load(theirs))
    weight, sigma = base
    norm = float(torch.linalg.vector_norm(sigma))
    if not frame.rank:
        return _unchanged(norm)
    shape = b.matrices[theirs]
    left, right = (frame.left * frame.sigma).to(weight.device), frame.right.to(weight.device)
    # GPT-2's Conv1D stores [in out], which cannot be detected for a square weight.
    flipped = a.matrices[ours] != shape or (b.source.meta.fan_in_fan_out and shape[0] == shape[1])
    other = dense_singular_values(weight.double() + (right @ left.T if flipped else left @ right.T))
    return Scaling(
        norm_a=norm,
        norm_b=float(torch.linalg.vector_norm(other)),
        distance=spectral_distance(sigma, other),
        difference_norm=frame.norm,
        stable_rank=frame.stable_rank,
    )


def _of_deltas(a: Updates, b: Updates, ours: str, theirs: str) -> Scaling:
    updates = [a.load(ours), b.load(theirs)]
    first, second = a.frame(ours, updates[0]), b.frame(theirs, updates[1])
    difference = b.frame(theirs, concatenate(updates, [-1.0, 1.0]))
    return Scaling(
        norm_a=first.norm,
        norm_b=second.norm,
        distance=spectral_distance(first.sigma, second.sigma),
        difference_norm=difference.norm,
        stable_rank=difference.stable_rank,
    )
