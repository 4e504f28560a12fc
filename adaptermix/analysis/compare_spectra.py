"""Singular-value scaling between two models, one pair of weights at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import torch

from ..algebra import concatenate
from ..algebra.spectra import dense_singular_values, spectral_distance, spectral_norm
from ..errors import IncompatibleAdapters, ModelError, PlanError
from ..io.files import write_whole
from ..models.devices import pick_device
from ..models.location import OUTSIDE, locations
from ..options.paths import check_file_not_input, check_replaceable
from ..progress import SILENT, Watcher
from .figures import check_file
from .selection import Globs, match_names, select
from .spectrum_inputs import Updates, Weights, beyond_factors, open_side
from .spectrum_report import Scaling, SpectrumReport

Side = Weights | Updates


def spectrum(
    model_a: str | Path,
    model_b: str | Path,
    *,
    csv: str | Path | None = None,
    device: str = "auto",
    watch: Watcher = SILENT,
    **chosen: Unpack[Globs],
) -> SpectrumReport:
    r"""Compare the singular values of two models, weight by weight.

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
        model_b: The other one, of the same kind, or an adapter of the base.
        csv: File for a table with one row per module.
        device: Device of the computation: auto, cpu, cuda or cuda:N.
        watch: Receives progress.
        chosen: The modules to compare; as in `selection.select`. Default all matrices inside the blocks.

    Differs from the paper: it does not define "norm" and "pairwise distance"; both are Euclidean here, which is
    consistent with all of its numbers.

    Raises:
        ModelError: a model is missing or damaged, or the two share no weight.
        IncompatibleAdapters: the adapter does not match the checkpoint.
        PlanError: a glob matches no module, or the adapter is the first model.
        OutputError: the CSV file cannot be written.

    Reference: Ji et al., Can Machine Translation Bridge Multilingual Pretraining and Cross-lingual Transfer Learning?,
    LREC-COLING 2024, arXiv 2403.16777, appendix B.2 and table 5.
    """
    if csv is not None:
        check_file(Path(csv), "--csv")
        check_file_not_input(Path(csv), (model_a, model_b))
        check_replaceable(Path(csv), "csv")
    target = pick_device(device)
    a, b = open_side(str(model_a)), open_side(str(model_b))
    compared, measure = _measure(a, b, target)
    pairs, notes = _pairs(a, b)
    notes += tuple(note for side in (a, b) if isinstance(side, Updates) for note in beyond_factors(side.source.meta))
    located = locations(pairs)
    paths = select(located, **chosen)
    if not paths:
        raise ModelError(
            f"{a.reference} and {b.reference} must share a selected matrix inside their blocks, and share no such "
            "matrix. Select others with --include, or exclude fewer.",
            code="spectrum.no-shared-selection",
        )
    numbers = {}
    with watch.track("spectrum", len(paths)) as advance:
        for path in paths:
            numbers[path] = measure(path, pairs[path])
            advance(1, path)
    report = SpectrumReport(
        a=a.reference,
        b=b.reference,
        compared=compared,
        modules=numbers,
        locations={path: located[path] for path in paths},
        notes=notes,
    )
    if csv is not None:
        write_whole(Path(csv), report.csv())
    return report


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


Measure = Callable[[str, str], Scaling]


def _measure(a: Side, b: Side, device: torch.device) -> tuple[str, Measure]:
    """Return the kind of comparison in words, and the function that compares one pair of paths.

    Raises:
        PlanError: the adapter is the first model.
    """
    if isinstance(a, Updates) and isinstance(b, Updates):
        return "adapters", lambda ours, theirs: _of_deltas(a, b, ours, theirs)
    if isinstance(a, Weights) and isinstance(b, Updates):
        return "base and base with adapter", lambda ours, theirs: _of_update(a, b, ours, theirs, device)
    if isinstance(a, Weights) and isinstance(b, Weights):
        return "checkpoints", lambda ours, theirs: _of_weights(a, b, ours, theirs, device)
    raise PlanError(
        f"the base must be the first model, and {a.reference} is an adapter. Swap MODEL_A and MODEL_B.",
        code="spectrum.order",
    )


def _unchanged(norm: float) -> Scaling:
    return Scaling(norm_a=norm, norm_b=norm, distance=0.0, difference_norm=0.0, stable_rank=0.0)


def _of_weights(a: Weights, b: Weights, ours: str, theirs: str, device: torch.device) -> Scaling:
    first, second = a.load(ours).to(device), b.load(theirs).to(device)
    dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = first.to(dtype), second.to(dtype)
    second = second if second.shape == first.shape else second.T
    sigma = dense_singular_values(first)
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


def _of_update(a: Weights, b: Updates, ours: str, theirs: str, device: torch.device) -> Scaling:
    frame = b.frame(theirs, b.load(theirs))
    weight = a.load(ours).to(device)
    sigma = dense_singular_values(weight)
    norm = float(torch.linalg.vector_norm(sigma))
    if not frame.rank:
        return _unchanged(norm)
    shape = b.matrices[theirs]
    left, right = (frame.left * frame.sigma).to(device), frame.right.to(device)
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
