"""`train-align --fit least-squares` and `--fit mean-shift`: alignment LoRAs without a gradient step."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..models.base import BaseModel, keep_blocks
from ..models.pooling import require_pooling
from ..models.positions import within_positions
from ..options import AlignSettings
from ..progress import Watcher
from ..provenance import manifest
from ..publish.output import write_output
from ..tasks.data import Pair, read_pairs
from ..tasks.data.files import DataFile
from ..tasks.data.report import RowsReport
from ..tasks.splits import DEV, TRAINING, refuse_tested
from .checkpoint import Workplace
from .closed_form import Explained, Fitted, explained, fit_closed_form
from .displacement import Reader, Sentence, groups_of, pair_weights, sentences_of
from .dry_run import aligned_layer, outline
from .frozen_adapter import attach_on
from .layer_states import MiddleStates
from .lora import Trained, state_of
from .pairs import describe_pairs, encode_side, read_dev_pairs, require_pairs
from .parallel import Processes
from .residual_writer import Tap, find_writer
from .run import check_before, input_entries, plain, vectors_entry
from .sharding import load_for

_HELD_OUT = 0.1
"""Share of the pairs that is kept aside to measure on, where no dev pairs are given."""
_PROBES = 8
"""Sentences that show which layer writes the states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Result of an alignment in closed form.

    Args:
        out: The adapter's folder.
        fit: "least-squares" or "mean-shift".
        layer: Number of the block whose states it aligns.
        rows: Counts of the pairs.
        objective: The manifest's entry on what was fitted and how much it explains; None after a dry run.
        parameters: Numbers in the LoRA's factors.
        seconds: What it took, without loading the model.
    """

    out: Path
    fit: str
    layer: int
    rows: RowsReport
    objective: dict[str, Any] | None = None
    parameters: int = 0
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return the JSON document of the command."""
        found = {"out": str(self.out), "fit": self.fit, "layer": self.layer}
        if self.objective is None:
            return found | {"dry_run": True, "rows": self.rows.document()}
        return found | {"parameters": self.parameters, "seconds": self.seconds} | self.objective


@dataclass(frozen=True, slots=True)
class _Data:
    """Pairs of a fit, and those that it is measured on."""

    pairs: list[Pair]
    held_out: list[Pair]
    files: list[DataFile]
    dev_files: list[DataFile]
    report: RowsReport


def fit_align(settings: AlignSettings, watch: Watcher, processes: Processes) -> FitReport:
    """Fit an alignment LoRA in closed form; see `closed_form`.

    Raises:
        PlanError: several processes, or a block that no linear layer writes.
        AdapterMixError: the model, a data file or the output does not do.
    """
    if processes.count > 1:
        raise PlanError(f"--fit {settings.fit} runs in one process. Start it without accelerate launch or torchrun.")
    check_before(settings)
    data = _read(settings, watch)
    tested = refuse_tested({TRAINING: data.files, DEV: data.dev_files}, allowed=settings.allow_tested, watch=watch)
    if settings.dry_run:
        model = outline(settings.base)
        attach_on(model, settings, headed=False)
        layer = aligned_layer(model, settings, whole=False)
        return FitReport(out=Path(settings.out), fit=settings.fit, layer=layer, rows=data.report)
    for note in data.report.warnings("pairs"):
        watch.note(note)
    workplace = Workplace(Path(settings.out), plain(settings))
    workplace.open(resume=settings.resume, overwrite=settings.overwrite)  # of a training into the same folder
    base = load_for(settings, processes)
    start = time.perf_counter()
    settings = within_positions(base, settings, watch)
    layer, total = aligned_layer(base.model, settings, whole=False), base.layers
    on = attach_on(base.model, settings, headed=base.head is not None)
    keep_blocks(base.model, layer)
    fitted, shares = _fit(base, settings, data, layer, watch)
    objective = {
        "name": settings.fit,
        "layer": layer,
        "layers": total,
        "pairs": len(data.pairs),
        "module": fitted.module,
        **fitted.document(),
        "held_out": None if shares is None else {"pairs": len(data.held_out)} | shares.document(),
    }
    entries = {
        "languages": {"aligned": sorted({language for pair in data.pairs for language in pair.languages})},
        "data": [file.entry() for file in data.files],
        "dev": [file.entry() for file in data.dev_files] or None,
        "tested": tested or None,
        "rows": data.report.document(),
        "objective": objective,
        "vectors": vectors_entry(settings),
        "inputs": input_entries(on, None),
    }
    trained = Trained(updates={fitted.module: fitted.update}, magnitudes={}, saved={})
    state = state_of(base, trained, [fitted.module.rpartition(".")[2]], layer if layer < total else None)
    document = manifest.manifest(
        "train-align", plan=plain(settings), base=base.entry(), **manifest.carry_on(entries, None, on)
    )
    write_output(Path(settings.out), state, document, overwrite=settings.overwrite)
    workplace.clear()
    return FitReport(
        out=Path(settings.out),
        fit=settings.fit,
        layer=layer,
        rows=data.report,
        objective=objective,
        parameters=fitted.update.a.numel() + fitted.update.b.numel(),
        seconds=time.perf_counter() - start,
    )


def _read(settings: AlignSettings, watch: Watcher) -> _Data:
    """Read the pairs, and set those aside that the fit is measured on: none of them shares a sentence with a pair."""
    pairs, files = read_pairs(settings.pairs, rows=settings.rows)
    require_pairs(pairs)
    dev, dev_files = read_dev_pairs(settings)
    report = describe_pairs(pairs, files, dev)
    if dev:
        held_out = _apart(dev, pairs)
        if len(held_out) < len(dev):
            watch.note(
                f"{len(dev) - len(held_out)} of {len(dev)} dev pairs share a sentence with the pairs, and do not count."
            )
        return _Data(pairs, held_out, files, dev_files, report)
    groups = groups_of(pairs)
    count = max(groups) + 1
    aside = set(random.Random(settings.seed).sample(range(count), round(_HELD_OUT * count)))  # noqa: S311
    fitted = [pair for pair, group in zip(pairs, groups, strict=True) if group not in aside]
    held_out = [pair for pair, group in zip(pairs, groups, strict=True) if group in aside]
    return _Data(fitted, _apart(held_out, fitted), files, dev_files, report)


def _apart(pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that share no sentence with other pairs."""
    seen = {text for pair in others for text in (pair.source, pair.target)}
    return [pair for pair in pairs if not {pair.source, pair.target} & seen]


def _fit(
    base: BaseModel, settings: AlignSettings, data: _Data, layer: int, watch: Watcher
) -> tuple[Fitted, Explained | None]:
    require_pooling(settings.pooling, base.kind)
    states = MiddleStates(base, layer, exclude_bos=settings.exclude_bos)
    sentences = _sentences(base, settings, data.pairs, watch)
    probes = [sentence.ids for sentence in sentences[:_PROBES]]
    writer = find_writer(base, layer, lambda: states.states(probes))
    reader = Reader(
        Tap(base, states, writer),
        batch_size=settings.batch_size,
        pooling=settings.pooling,
        last=base.kind == "causal",
    )
    fitted = fit_closed_form(
        reader, writer, sentences, rank=settings.rank, shift_only=settings.fit == "mean-shift", watch=watch
    )
    if fitted.map.left_out is not None and fitted.map.left_out <= 0:
        watch.note(
            f"warning: the map of {len(data.pairs)} pairs takes pairs that it has not seen no nearer to their "
            f"translations ({fitted.map.left_out:.0%} of the way): the adapter may do harm. Give more pairs."
        )
    if not data.held_out:
        return fitted, None
    held_out = _sentences(base, settings, data.held_out, watch)
    return fitted, explained(base.model, reader, fitted, held_out, watch)


def _sentences(base: BaseModel, settings: AlignSettings, pairs: Sequence[Pair], watch: Watcher) -> list[Sentence]:
    sides = [encode_side(base.tokenizer, pairs, side, settings.max_length, watch) for side in ("source", "target")]
    return sentences_of(
        pairs, sides[0], sides[1], weights=pair_weights(pairs, settings.balance), groups=groups_of(pairs)
    )
