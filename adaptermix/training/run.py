"""What both training commands do around the loop: load, inject, train, write."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters import AdapterSource
from ..io.files import check_output
from ..models.base import BaseModel, files_of
from ..options import AlignSettings, JointSettings, TrainingSettings
from ..options.roles import Role, marked
from ..progress import Watcher
from ..provenance import manifest
from ..publish.output import write_output
from ..tasks.data.report import RowsReport
from .checkpoint import Checkpoint, Workplace
from .compiling import compiled
from .dry_run import count_lora
from .early_stopping import DevWatch
from .lora import config_of, count_trainable, extract, inject, scales, start_of, state_of
from .parallel import ALONE, Processes
from .start_from import values_of
from .trainer import Loss, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Result of a training run.

    Args:
        out: The adapter's folder.
        steps: Optimizer steps.
        parameters: Trainable parameters; of a dry run those of the LoRA alone.
        history: One entry per step: loss, rows, tokens, seconds.
        rows: Of a dry run: counts of the training rows.
        pairs: Of a dry run: counts of the pairs, where both are trained on.
        kept: Step whose factors were kept, where the dev loss chose.
    """

    out: Path
    steps: int
    parameters: int
    history: list[dict[str, Any]]
    rows: RowsReport | None = None
    pairs: RowsReport | None = None
    kept: int | None = None

    def _losses(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """Return first and last loss; of joint training those of each objective."""
        names = dict.fromkeys(name for entry in steps for name in entry.get("objectives", {}))
        found = {name: [e["objectives"][name]["loss"] for e in steps if name in e["objectives"]] for name in names}
        whole = {"loss": {"first": steps[0]["loss"], "last": steps[-1]["loss"]}}
        parts = {name: {"first": losses[0], "last": losses[-1]} for name, losses in found.items()}
        return whole | ({"objectives": parts} if parts else {})

    def _looks(self) -> dict[str, Any]:
        """Return first, last and best value of what was measured on dev data, if there was any."""
        looks = [entry for entry in self.history if "seconds" not in entry]
        names = dict.fromkeys(name for entry in looks for name in entry if name != "step")
        values = {name: [entry[name] for entry in looks if name in entry] for name in names}
        dev = {
            name: {"first": v[0], "last": v[-1], "best": max(v) if name.endswith("accuracy") else min(v)}
            for name, v in values.items()
        }
        return {"dev": dev} if dev else {}

    def document(self) -> dict[str, Any]:
        """Return the JSON document of the training commands."""
        steps = [entry for entry in self.history if "seconds" in entry]
        if not steps:
            rows = self.rows.document() if self.rows else None
            pairs = {} if self.pairs is None else {"pairs": self.pairs.total, "pair_rows": self.pairs.document()}
            plan = {"out": str(self.out), "steps": self.steps, "lora_parameters": self.parameters, "dry_run": True}
            return plan | {"rows": rows} | pairs
        seconds = sum(entry["seconds"] for entry in steps)
        return {
            "out": str(self.out),
            "steps": len(steps),
            "steps_planned": self.steps,
            "kept_step": self.kept or len(steps),
            "parameters": self.parameters,
            **self._losses(steps),
            **self._looks(),
            "seconds_per_step": seconds / len(steps),
            "tokens_per_second": sum(entry["tokens"] for entry in steps) / seconds,
        }


def plain(settings: TrainingSettings) -> dict[str, Any]:
    """Return the settings that decide the result, as plain data."""
    return settings.model_dump(mode="json", exclude={"out", *marked(settings, Role.HANDLING, Role.SCHEDULING)})


def vectors_entry(settings: AlignSettings | JointSettings) -> dict[str, Any]:
    """Return the manifest's entry on how sentences become vectors, which merges take over."""
    return settings.model_dump(include={"pooling", "exclude_bos", "standardize"})


def first_draw(seed: int, kind: str) -> int:
    """Return the seed of a LoRA's first factors, another one for each command.

    Adapters that begin with the same A still share it when they are trained, and seem to read the same directions.
    """
    return random.Random(f"{seed}/{kind}").getrandbits(63)  # noqa: S311


def train(
    base: BaseModel,
    settings: TrainingSettings,
    make_loss: Callable[[], Loss],
    *,
    steps: int,
    kind: str,
    entries: Mapping[str, Any],
    layers: int | None,
    watch: Watcher,
    on: AdapterSource | None = None,
    start: AdapterSource | None = None,
    unit: str = "rows",
    dev: DevWatch | None = None,
    processes: Processes = ALONE,
    write: Callable[..., None] | None = None,
) -> TrainReport:
    """Inject a LoRA, train it, write it; or go on with a run that was interrupted.

    Args:
        base: The base model, already cut to the blocks that the objective needs.
        settings: The run's settings.
        make_loss: Called once the LoRA is in; returns the loss function.
        steps: Optimizer steps.
        kind: Command name, for the manifest.
        entries: Further entries of the manifest.
        layers: Number of adapted blocks if not all.
        watch: Receives progress.
        on: Adapter that is trained on top of, attached already.
        start: Adapter that training begins from, fitted to the model.
        unit: What a row is called.
        dev: Looks at the dev loss after each step.
        processes: Those that share the run; the main one writes.
        write: Writes what is no plain adapter: takes the folder, PEFT's config, what was trained, manifest and history.
    """
    out = Path(settings.out)
    workplace = Workplace(out, plain(settings) | _inputs(settings, base, entries, on, start) | processes.entry())
    names = inject(base.model, settings, seed=first_draw(settings.seed, kind), head=base.head_modules, start=start)
    scale_of, taken = scales(base.model), start_of(base.model, settings)
    checkpoint = processes.main_first(lambda: workplace.open(resume=settings.resume, overwrite=settings.overwrite))
    trainer = Trainer(base.model, settings, steps=steps, workplace=workplace, watch=watch, processes=processes)
    if start:
        trainer.begin_at(values_of(start, trainer.masters))
    if checkpoint:
        _go_on(trainer, checkpoint, dev)
        watch.note(f"resumed at step {checkpoint.step} of {steps}")
    elif settings.resume:
        watch.note(f"no interrupted run for {out}: starting from the first step")
    if base.model.dtype == torch.float16:
        watch.note("warning: float16 gradients are not scaled and may vanish; --dtype bfloat16 or float32 is safer.")
    with compiled(base.model, wanted=settings.compile):
        trainer.run(make_loss(), after_step=dev, label=kind, unit=unit)
    trainer.finish()
    selection = None if trainer.kept is None else {"kept_step": trainer.kept, "steps": trainer.done}
    more = {"inputs": input_entries(on, start), "selection": selection, "engine": processes.entry() or None}
    entries = manifest.carry_on(entries, start, on)
    document = manifest.manifest(kind, plan=plain(settings), base=base.entry(), **more, **entries)
    history = "".join(json.dumps(entry) + "\n" for entry in trainer.history).encode()
    if processes.main and write:
        config = config_of(settings, base, names)
        write(out, config, trainer.masters, document, history, overwrite=settings.overwrite)
        workplace.clear()
    elif processes.main:
        state = state_of(base, extract(trainer.masters, scale_of, taken), names, layers)
        write_output(out, state, document, overwrite=settings.overwrite, extra={"history.jsonl": history})
        workplace.clear()
    processes.wait()
    return TrainReport(
        out=out, steps=steps, parameters=count_trainable(base.model), history=trainer.history, kept=trainer.kept
    )


def input_entries(on: AdapterSource | None, start: AdapterSource | None) -> list[dict[str, Any]] | None:
    """Return the manifest's entries on the adapters that a run builds on; the one that it begins from is marked."""
    below = [manifest.input_entry(on, 1.0)] if on else []
    return below + ([manifest.input_entry(start, 1.0) | {"use": manifest.START}] if start else []) or None


def _inputs(
    settings: TrainingSettings,
    base: BaseModel,
    entries: Mapping[str, Any],
    on: AdapterSource | None,
    start: AdapterSource | None,
) -> dict[str, Any]:
    """Return what decides the result beside the settings; the dtype that `auto` has become stands in its place."""
    return {
        "base_fingerprint": base.fingerprint,
        "base_files": files_of(settings.base),
        "encoder": (entries.get("fusion") or {}).get("encoder_fingerprint"),
        "dtype": base.entry()["dtype"],
        "on": on and on.digest,
        "start": start and start.digest,
        "data": entries["data"],
        "dev": entries.get("dev"),
    }


def _go_on(trainer: Trainer, checkpoint: Checkpoint, dev: DevWatch | None) -> None:
    """Go back to a checkpoint, also in what the dev loss had decided."""
    trainer.restore(checkpoint)
    if dev:
        dev.go_on(trainer)


def dry_report(
    settings: TrainingSettings,
    steps: int,
    *,
    rows: RowsReport,
    pairs: RowsReport | None = None,
    start: AdapterSource | None = None,
) -> TrainReport:
    """Return the report of a run that was only checked.

    Raises:
        AdapterMixError: see `count_lora`.
    """
    parameters = count_lora(settings, start)
    return TrainReport(out=Path(settings.out), steps=steps, parameters=parameters, history=[], rows=rows, pairs=pairs)


def check_before(settings: TrainingSettings) -> None:
    """Refuse an output that cannot be written before anything slow is done."""
    if not settings.resume:
        check_output(Path(settings.out), overwrite=settings.overwrite)
