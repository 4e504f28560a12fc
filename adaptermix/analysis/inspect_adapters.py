"""Inspect adapters one module at a time, using only the factors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

from ..adapters import AdapterSource, open_adapters
from ..algebra import LowRank, sign_conflict
from ..algebra.subspaces import Frame, chance_overlap, frame, frame_cosine, overlap, share_within
from ..errors import AdapterFormatError, PlanError, code_of
from ..models.location import locations, mean, unique_names
from ..models.stack import ADAPTER, stack_folder
from ..options.paths import check_file_not_input, check_replaceable
from ..progress import SILENT, Watcher
from .figures import check_plot, draw
from .inspect_report import AdapterInspection, Inspection, ModuleNumbers, PairInspection, PairNumbers
from .inspect_stack import inspect_stack
from .spectrum_inputs import beyond_factors

_Loaded = dict[int, tuple[LowRank, Frame]]
_ALIKE = 0.5
"""Mean cosine of rows of A above which two trainings probably started with the same A; otherwise it is near 0."""


def inspect(adapters: Sequence[str | Path], *, plot: str | Path | None = None, watch: Watcher = SILENT) -> Inspection:
    r"""Inspect adapters: norm, ranks and share per layer and module kind; for pairs, cosine and overlaps.

    Everything is computed from the factors in float64: two thin QRs and one r x r SVD per update, never a dense matrix.
    Only the share of sign conflicts needs entries. It is counted on at most 16,384 random entries per module, as in the
    report of a merge, and is exact for smaller modules.

    Overlap is the mean squared cosine of the principal angles, $\|U_1^T U_2\|_F^2 / \min(r_1, r_2)$ with bases of
    numerical rank: between the column spaces of B (left: the directions that the deltas write) and the row spaces of A
    (right: the directions that they read).

    Args:
        adapters: Adapter folders, or folders of stacks, whose own LoRAs are inspected. They are named after the
            folders; a second `task` becomes `task#2`.
        plot: PNG file for heatmaps over layers and module kinds.
        watch: Receives progress.

    Raises:
        AdapterFormatError: an adapter is damaged or has unsupported content.
        OutputError: the plot cannot be written.
        PlanError: there is no adapter, or there are more than a plot can show.
    """
    if not adapters:
        raise PlanError("at least one adapter is needed to inspect, got none.", code="inspect.no-adapter")
    if plot is not None:
        check_plot(Path(plot), count=len(adapters))
        check_file_not_input(Path(plot), adapters)
        check_replaceable(Path(plot), "plot")
    stacks = {str(path): inspect_stack(Path(path)) for path in adapters if stack_folder(str(path))}
    folders = [path for path in adapters if str(path) not in stacks or stacks[str(path)].lora]
    inner = [Path(path) / ADAPTER if str(path) in stacks else path for path in folders]
    if plot is not None and not folders:
        raise PlanError(
            "a plot needs an adapter, and there is no LoRA in these stacks: drop --plot.", code="inspect.no-adapter"
        )
    # A head in one of them changes the paths of its encoder.
    sources = open_adapters(inner) if inner else []
    names = unique_names([Path(path).resolve().name for path in folders])
    paths = list(dict.fromkeys(path for source in sources for path in source.modules))
    singles: list[dict[str, ModuleNumbers]] = [{} for _ in sources]
    pairs: dict[tuple[int, int], dict[str, PairNumbers]] = {key: {} for key in combinations(range(len(sources)), 2)}
    with watch.track("inspect", len(paths)) as advance:
        for path in paths:
            loaded = _load(sources, path)
            for index, (update, frame) in loaded.items():
                singles[index][path] = _single(update, frame)
            for (i, j), numbers in pairs.items():
                if i in loaded and j in loaded and loaded[i][0].shape == loaded[j][0].shape:
                    numbers[path] = _pair(loaded[i], loaded[j])
            advance(1, path)
    matches = tuple(
        AdapterInspection(
            name=name,
            path=str(folder),
            base=source.meta.base,
            modules=modules,
            notes=beyond_factors(source.meta),
        )
        for name, folder, source, modules in zip(names, folders, sources, singles, strict=True)
    )
    result = Inspection(
        adapters=matches,
        pairs=tuple(
            PairInspection(a=matches[i], b=matches[j], modules=numbers, notes=_notes(matches[i], matches[j], numbers))
            for (i, j), numbers in pairs.items()
        ),
        locations=locations(paths),
        stacks=dict(zip(unique_names([Path(path).resolve().name for path in stacks]), stacks.values(), strict=True)),
    )
    if plot is not None:
        draw(result, Path(plot))
    return result


def _load(sources: Sequence[AdapterSource], path: str) -> _Loaded:
    """Read the updates of one module and decompose them, by index of the adapter."""
    loaded = {}
    for index, source in enumerate(sources):
        if path in source.modules:
            update = source.load(path)
            try:
                loaded[index] = update, frame(update)
            except ValueError as error:
                raise AdapterFormatError(
                    f"{source.path}: module '{path}': {error}. Check lora_alpha in its settings.",
                    code=code_of(error, "inspect.overflow"),
                ) from error
    return loaded


def _single(update: LowRank, frame: Frame) -> ModuleNumbers:
    return ModuleNumbers(rank=update.rank, numerical_rank=frame.rank, norm=frame.norm, stable_rank=frame.stable_rank)


def _pair(first: tuple[LowRank, Frame], second: tuple[LowRank, Frame]) -> PairNumbers:
    (update_a, a), (update_b, b) = first, second
    chance = [chance_overlap(a.rank, b.rank, side) for side in update_a.shape] if a.rank and b.rank else []
    return PairNumbers(
        cosine=frame_cosine(a, b),
        sign_conflict=sign_conflict([update_a, update_b]),
        overlap_left=overlap(a.left, b.left),
        overlap_right=overlap(a.right, b.right),
        overlap_by_chance=sum(chance) / len(chance) if chance else None,
        share_a_in_b=share_within(a, b),
        share_b_in_a=share_within(b, a),
        first_factors=_first_factors(update_a, update_b),
    )


def _first_factors(one: LowRank, other: LowRank) -> float | None:
    if one.a.shape != other.a.shape or torch.equal(one.a, other.a):  # equal after training means a copy
        return None
    return float(torch.nn.functional.cosine_similarity(one.a.double(), other.a.double(), dim=1).mean())


def _notes(a: AdapterInspection, b: AdapterInspection, compared: dict[str, PairNumbers]) -> tuple[str, ...]:
    """Explain missing numbers and numbers that need care."""
    notes = []
    both = set(a.modules) & set(b.modules)
    pair = f"'{a.name}' and '{b.name}'"
    if not both:
        notes.append(f"{pair} have no module in common")
    elif len(compared) < len(both):
        notes.append(f"{pair} differ in shape at {len(both) - len(compared)} of {len(both)} shared modules, left out")
    if both and not all(adapter.norm() > 0 for adapter in (a, b)):
        zero = [f"'{adapter.name}'" for adapter in (a, b) if not adapter.norm() > 0]
        notes.append(f"the delta of {' and of '.join(zero)} is zero, so there is no angle")
    alike = mean(numbers.first_factors for numbers in compared.values())
    if a.path != b.path and alike is not None and alike > _ALIKE:
        notes.append(
            f"{pair} have similar A factors row by row (mean cosine {alike:.2f}), as if both trainings started with "
            "the same random A: the overlap on the right, and its mean with the left one, are not informative"
        )
    if a.base and b.base and a.base != b.base:
        notes.append(f"{pair} name different base models, '{a.base}' and '{b.base}'")
    return tuple(notes)
