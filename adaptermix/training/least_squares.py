"""`train-align`, and its closed forms `--fit least-squares` and `mean-shift`, which take no gradient step."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import PlanError
from ..models.base import BaseModel
from ..models.pooling import require_pooling
from ..options import AlignSettings
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..publish.output import write_output
from ..tasks.data import Pair
from .align import AlignObjective
from .checkpoint import Workplace
from .closed_form import Explained, Fitted, explained, fit_closed_form
from .displacement import Reader, Sentence, groups_of, pair_weights, sentences_of
from .dry_run import aligned_layer, outline
from .frozen_adapter import attach_on
from .layer_states import MiddleStates
from .lora import Trained, state_of
from .pairs import PairData, encode_side
from .report import FitReport, TrainReport
from .residual_writer import Tap, find_writer
from .runner import input_entries, plain, run_training

_HELD_OUT = 0.1
"""Share of the pairs that is held out to measure on if there are no dev pairs."""
_PROBES = 8
"""Sentences that show which layer writes the states."""


class Alignment(AlignObjective[AlignSettings]):
    """Alignment as the only objective."""

    command = "train-align"


class ClosedForm(Alignment):
    """Alignment that is computed instead of trained; see `closed_form`."""

    workplace: Workplace
    held_out: Sequence[Pair]

    def read(self) -> None:
        settings, watch = self.run.settings, self.run.watch
        if self.run.processes.count > 1:
            raise PlanError(
                f"--fit {settings.fit} runs in one process. Start it without accelerate launch or torchrun.",
                code="align.fit-processes",
            )
        super().read()
        self.data, self.held_out = hold_out(self.data, settings.seed)
        if len(self.held_out) < (count := len(self.data.dev)):
            watch.note(
                f"{count - len(self.held_out)} of {count} dev pairs share a sentence with the pairs, and do not count."
            )

    def load(self) -> BaseModel:
        settings = self.run.settings
        # An interrupted training into the same folder is refused or removed before the slow part.
        self.workplace = Workplace(Path(settings.out), plain(settings))
        self.workplace.open(resume=settings.resume, overwrite=settings.overwrite)
        return super().load()

    def dry_run(self) -> FitReport:
        settings = self.run.settings
        model = outline(settings.base)
        attach_on(model, settings, headed=False)
        layer = aligned_layer(model, settings, whole=False)
        return FitReport(out=Path(settings.out), fit=settings.fit, layer=layer, rows=self.report)

    def finish(self) -> FitReport:
        start = time.perf_counter()
        run, settings, base, layer = self.run, self.run.settings, self.run.base, self.depth[0]
        fitted, shares = self._fit()
        entries = self.entries()
        objective = entries["objective"] | {
            "name": settings.fit,
            "module": fitted.module,
            **fitted.document(),
            "held_out": None if shares is None else {"pairs": len(self.held_out)} | shares.document(),
        }
        trained = Trained(updates={fitted.module: fitted.update}, magnitudes={}, saved={})
        state = state_of(base, trained, [fitted.module.rpartition(".")[2]], self.layers)
        document = manifest.manifest(
            self.command,
            plan=plain(settings),
            base=base.entry(),
            inputs=input_entries(run.frozen, None),
            **manifest.carry_on(entries | {"objective": objective}, None, run.frozen),
        )
        with self.workplace.cleared_when_written():
            write_output(Path(settings.out), state, document, overwrite=settings.overwrite)
        return FitReport(
            out=Path(settings.out),
            fit=settings.fit,
            layer=layer,
            rows=self.report,
            objective=objective,
            parameters=fitted.update.a.numel() + fitted.update.b.numel(),
            seconds=time.perf_counter() - start,
        )

    def _fit(self) -> tuple[Fitted, Explained | None]:
        """Return the fit, and how much of the held-out pairs it explains."""
        settings, base, watch = self.run.settings, self.run.base, self.run.watch
        require_pooling(settings.pooling, base.kind)
        layer, pairs = self.depth[0], self.data.pairs
        states = MiddleStates(base, layer, exclude_bos=settings.exclude_bos)
        sentences = _sentences(base, settings, pairs, watch)
        probes = [sentence.ids for sentence in sentences[:_PROBES]]
        writer = find_writer(base, layer, lambda: states.states(probes))
        tap, last = Tap(base, states, writer), base.kind == "causal"
        reader = Reader(tap, batch_size=settings.batch_size, pooling=settings.pooling, last=last)
        fitted = fit_closed_form(
            reader, writer, sentences, rank=settings.rank, shift_only=settings.fit == "mean-shift", watch=watch
        )
        if fitted.map.left_out is not None and fitted.map.left_out <= 0:
            watch.note(
                f"warning: the map of {len(pairs)} pairs takes pairs that it has not seen no nearer to their "
                f"translations ({fitted.map.left_out:.0%} of the way): the adapter may do harm. Give more pairs."
            )
        if not self.held_out:
            return fitted, None
        held_out = _sentences(base, settings, self.held_out, watch)
        return fitted, explained(base.model, reader, fitted, held_out, watch)


def train_align(settings: AlignSettings, *, watch: Watcher = SILENT, callbacks: Sequence[object] = ()) -> TrainReport:
    """Train an alignment LoRA on parallel pairs, or compute one in closed form (`fit`), which returns a `FitReport`.

    The loss acts on pooled states after block L; later blocks and the output layer are neither computed nor adapted, so
    the LoRA has no weights there. Dev pairs are measured in batches of the training's size, which decides their
    contrastive loss, and how often a sentence is nearest to its own translation.

    Args:
        settings: The run's settings.
        watch: Receives progress.
        callbacks: Objects with methods of transformers' `TrainerCallback`; see `training.callbacks.Callbacks`.

    Raises:
        AdapterMixError: invalid model, data file, setting or output.
    """
    kind = Alignment if settings.fit == "gradient" else ClosedForm
    return run_training(kind, settings, watch=watch, callbacks=callbacks)


def hold_out(data: PairData, seed: int) -> tuple[PairData, list[Pair]]:
    """Return pairs to fit and pairs to measure on, which share no sentence: the dev pairs, or a tenth of the pairs."""
    if data.dev:
        return data, _apart(data.dev, data.pairs)
    groups = groups_of(data.pairs)
    count = max(groups) + 1
    aside = set(random.Random(seed).sample(range(count), round(_HELD_OUT * count)))  # noqa: S311
    fitted = [pair for pair, group in zip(data.pairs, groups, strict=True) if group not in aside]
    held_out = [pair for pair, group in zip(data.pairs, groups, strict=True) if group in aside]
    return replace(data, pairs=fitted), _apart(held_out, fitted)


def _apart(pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that share no sentence with other pairs."""
    seen = {text for pair in others for text in (pair.source, pair.target)}
    return [pair for pair in pairs if not {pair.source, pair.target} & seen]


def _sentences(base: BaseModel, settings: AlignSettings, pairs: Sequence[Pair], watch: Watcher) -> list[Sentence]:
    sides = [encode_side(base, pairs, side, settings.max_length, watch) for side in ("source", "target")]
    return sentences_of(
        pairs, sides[0], sides[1], weights=pair_weights(pairs, settings.balance), groups=groups_of(pairs)
    )
