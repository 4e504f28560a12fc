"""The steps that all training commands share, from the settings to the adapter on disk.

A command brings an `Objective`; `run_training` calls its methods in their order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, TypedDict, TypeVar

import torch
from torch import Tensor

from ..adapters import AdapterSource, write_adapter
from ..algebra import LowRank
from ..io.files import check_output, whole_folder, write_whole
from ..io.json_types import JsonObject
from ..models.base import BaseModel, files_of
from ..models.positions import within_positions
from ..options import TrainingSettings
from ..options.roles import Role, marked
from ..progress import SILENT, Watcher
from ..provenance import manifest
from ..publish.output import write_documents
from ..tasks.data.report import RowsReport
from .callbacks import require_tracker, tracking
from .checkpoint import Checkpoint, Workplace
from .compiling import compiled
from .dry_run import count_lora
from .early_stopping import DevLosses, EarlyStopping, RowsLoss
from .frozen_adapter import attach_on
from .lora import count_trainable, extract, inject, scales, start_of, state_of
from .parallel import ALONE, Processes, in_processes
from .report import TrainReport
from .sharding import load_for
from .start_from import fit_start, open_start, values_of
from .trainer import Loss, Together, Trainer, count_steps

S = TypeVar("S", bound=TrainingSettings)

LOOKS = "looks"
"""Folder in an output with an output per look: a measurement of the dev loss."""
FileEntries = Sequence[Mapping[str, object]]
"""The manifest's entries on data files."""


class DataEntries(TypedDict):
    """The manifest's entries on the data of a run.

    Args:
        languages: Languages by their role.
        data: Training files.
        dev: Dev files, if there are any.
        tested: Files that were evaluated as test data before, if there are any.
        rows: Counts of the training rows.
    """

    languages: dict[str, list[str]]
    data: FileEntries
    dev: FileEntries | None
    tested: FileEntries | None
    rows: JsonObject


def both(first: FileEntries | None, second: FileEntries | None) -> FileEntries | None:
    """Return the entries on two groups of files; None without any."""
    return [*(first or ()), *(second or ())] or None


@dataclass(slots=True, kw_only=True)
class Run(Generic[S]):
    """A training run, which the runner completes step by step.

    Args:
        settings: The run's settings.
        watch: Receives progress.
        processes: The processes that share the run; the main one writes.
        callbacks: Callbacks of the caller; see `callbacks.Callbacks`.
        start: Adapter that training starts from, if any; fitted to the model once that is loaded.
        frozen: Adapter that is trained on top of, if any; attached to the model.
        base: The base model, once it is loaded.
        names: Names of the adapted modules, once the LoRA is injected.
        scales: Factor of each module's update.
        taken: What the LoRA took out of the base when it was injected, per module.
    """

    settings: S
    watch: Watcher = SILENT
    processes: Processes = ALONE
    callbacks: Sequence[object] = ()
    start: AdapterSource | None = None
    frozen: AdapterSource | None = None
    base: BaseModel = field(init=False)
    names: list[str] = field(init=False)
    scales: dict[str, float] = field(init=False)
    taken: dict[str, LowRank] = field(init=False)


class Objective(Generic[S]):
    """What a LoRA is trained for: its data, its loss and its entries in the manifest.

    The runner calls `read`, then `check` in a dry run; else `notes`, `load`, `prepare`, `dev`, `entries`, then injects
    the LoRA and asks for the `loss`.

    Args:
        run: The run.

    Attributes:
        command: Name of the command, for the manifest.
        unit: What a row is called.
        selects: Dev value that decides about early stopping.
        measure: Dev value by which runs can be compared.
        turns: How many objectives take turns; an epoch takes as many times the steps.
        layers: Number of blocks that are run; None for all.
        teacher: Adapter that the training learns from; its data files count as seen.
        report: Counts of the training rows.
    """

    command: ClassVar[str]
    unit: ClassVar[str] = "rows"
    selects = "dev_loss"
    measure = "dev_loss"
    turns = 1
    layers: int | None = None
    teacher: AdapterSource | None = None
    report: RowsReport

    def __init__(self, run: Run[S]) -> None:
        self.run = run

    def read(self) -> None:
        """Read the data files and refuse test data; no model is loaded yet.

        Raises:
            AdapterMixError: a data file is invalid or was evaluated as test data.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Check in a dry run what can be checked without weights."""

    def notes(self) -> list[str]:
        """Return notes on the data."""
        return []

    def load(self) -> BaseModel:
        """Load the base model."""
        return load_for(self.run.settings, self.run.processes)

    def prepare(self) -> None:
        """Encode the data and change the loaded base model as needed, before the LoRA is injected."""

    def rows(self) -> int:
        """Return the number of rows to learn from."""
        raise NotImplementedError

    def steps(self) -> int:
        """Return the number of optimizer steps."""
        return count_steps(self.rows(), self.run.settings)

    def dev(self) -> dict[str, RowsLoss]:
        """Return the losses of dev rows by the names under which they are logged."""
        return {}

    def dev_values(self) -> Callable[[], dict[str, float]] | None:
        """Return the function that measures the dev rows; None without dev rows."""
        run, sides = self.run, self.dev()
        return DevLosses(run.base, sides, run.settings, run.processes) if sides else None

    def entries(self) -> Mapping[str, object]:
        """Return the manifest's entries; `data` lists the training files with their `sha256`."""
        raise NotImplementedError

    def inputs(self) -> JsonObject:
        """Return further values that decide the result; a resumed run needs the same ones."""
        return {}

    def inject(self) -> list[str]:
        """Put the trained parameters into the model, by default a LoRA; return the names of the adapted modules."""
        run = self.run
        seed = first_draw(run.settings.seed, self.command)
        return inject(run.base.model, run.settings, seed=seed, head=run.base.head_modules, start=run.start)

    def parameters(self) -> int:
        """Return in a dry run how many parameters would be trained, without a head."""
        return count_lora(self.run.settings, self.run.start)

    def loss(self, together: Together | None = None) -> Loss:
        """Return the loss of batches, now that the LoRA is in.

        Args:
            together: From a batch number to the batches of the same optimizer step; default `accumulate` in a row.
        """
        raise NotImplementedError

    def write(self, folder: Path, factors: dict[str, Tensor]) -> None:
        """Write the adapter without its manifest, card and history.

        Args:
            folder: An empty folder.
            factors: Trained tensors by parameter name.
        """
        run = self.run
        write_adapter(folder, state_of(run.base, extract(factors, run.scales, run.taken), run.names, self.layers))

    def closing_notes(self, factors: Mapping[str, Tensor]) -> list[str]:  # noqa: ARG002
        """Return notes on the trained tensors, by parameter name."""
        return []

    def dry_run(self) -> TrainReport:
        """Return the report of a dry run.

        Raises:
            AdapterMixError: see `check` and `parameters`.
        """
        settings = self.run.settings
        self.check()
        parameters, out = self.parameters(), Path(settings.out)
        return TrainReport(out=out, steps=self.steps(), parameters=parameters, history=[], rows=self.report)

    def finish(self) -> TrainReport:
        """Train the LoRA and write it."""
        return train(self)


def run_training(
    objective: Callable[[Run[S]], Objective[S]],
    settings: S,
    *,
    watch: Watcher = SILENT,
    callbacks: Sequence[object] = (),
) -> TrainReport:
    """Train a LoRA for an objective, in all processes that a launcher started.

    Args:
        objective: Makes the objective of a run.
        settings: The run's settings.
        watch: Receives progress.
        callbacks: Further callbacks of the training; see `callbacks.Callbacks`.

    Raises:
        AdapterMixError: invalid model, data file, setting or output.
    """

    def work(settings: S, watch: Watcher, processes: Processes) -> TrainReport:
        if not settings.resume:  # refuse an output that cannot be written before anything slow is done
            check_output(Path(settings.out), overwrite=settings.overwrite)
        require_tracker(settings.log_with)
        settings, start = open_start(settings)
        run = Run(settings=settings, watch=watch, processes=processes, callbacks=callbacks, start=start)
        task = objective(run)
        task.read()
        if settings.dry_run:
            return task.dry_run()
        for note in task.notes():
            watch.note(note)
        run.base = base = task.load()
        run.settings = settings = within_positions(base.model, settings, watch)
        run.start = start and fit_start(base.model, start, settings, fingerprint=base.fingerprint)
        run.frozen = attach_on(base.model, settings, headed=base.head is not None)
        task.prepare()
        return task.finish()

    return in_processes(work, settings, watch)


def train(objective: Objective[S]) -> TrainReport:
    """Inject a LoRA, train it and write it; or continue an interrupted run."""
    run, steps, evaluate = objective.run, objective.steps(), objective.dev_values()
    settings, base, watch, processes = run.settings, run.base, run.watch, run.processes
    entries = objective.entries()
    workplace = Workplace(Path(settings.out), plain(settings) | _inputs(objective, entries) | processes.entry())
    run.names = objective.inject()
    run.scales, run.taken = scales(base.model), start_of(base.model, settings)
    checkpoint = processes.main_first(lambda: workplace.open(resume=settings.resume, overwrite=settings.overwrite))
    logging = tracking(settings, processes, watch, folder=workplace.folder, resumed=checkpoint is not None)
    with logging as trackers, compiled(base.model, enabled=settings.compile):
        early = [_early_stopping(objective, steps)] if evaluate else []
        trainer = Trainer(
            base.model,
            settings,
            steps=steps,
            workplace=workplace,
            watch=watch,
            processes=processes,
            callbacks=[*early, *trackers, *run.callbacks],
        )
        _begin(trainer, run, checkpoint)
        trainer.run(objective.loss(), label=objective.command, unit=objective.unit, evaluate=evaluate)
    trainer.finish()
    if processes.main:
        with workplace.cleared_when_written():
            _write(objective, trainer, entries, workplace)
        for note in objective.closing_notes(trainer.masters):
            watch.note(note)
    processes.wait()
    parameters = count_trainable(base.model)
    return TrainReport(
        out=Path(settings.out), steps=steps, parameters=parameters, history=trainer.history, kept=trainer.kept
    )


def _write(objective: Objective[S], trainer: Trainer, entries: Mapping[str, object], workplace: Workplace) -> None:
    """Write the output, with the factors of every look in `looks/STEP` if they were kept."""
    settings, out = objective.run.settings, Path(objective.run.settings.out)

    def write(folder: Path, factors: dict[str, Tensor], step: int | None, title: str) -> None:
        history = [entry for entry in trainer.history if step is None or entry["step"] <= step]
        chosen = trainer.kept if step is None else step
        selection = None if chosen is None else {"kept_step": chosen, "steps": trainer.done}
        objective.write(folder, factors)
        write_documents(folder, _manifest(objective, entries, selection), name=title)
        write_whole(folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in history).encode())

    with whole_folder(out, overwrite=settings.overwrite) as folder:
        write(folder, trainer.masters, None, out.name)
        for step in trainer.looks if settings.keep_looks else ():
            (look := folder / LOOKS / str(step)).mkdir(parents=True)
            write(look, workplace.look(step), step, f"{out.name}, step {step}")


def _begin(trainer: Trainer, run: Run[S], checkpoint: Checkpoint | None) -> None:
    """Set the factors that training starts from, and note how the run starts."""
    if run.start:
        trainer.start_at(values_of(run.start, trainer.masters))
    if checkpoint:
        trainer.restore(checkpoint)
        run.watch.note(f"resumed at step {checkpoint.step} of {trainer.steps}")
    elif run.settings.resume:
        run.watch.note(f"no interrupted run for {run.settings.out}: starting from the first step")
    if run.base.model.dtype == torch.float16:
        run.watch.note("warning: float16 gradients are not scaled and may vanish; prefer --dtype bfloat16 or float32.")


def _early_stopping(objective: Objective[S], steps: int) -> EarlyStopping:
    return EarlyStopping(
        objective.run.settings,
        steps=steps,
        rows=objective.rows(),
        key=objective.selects,
        turns=objective.turns,
        measure=objective.measure,
        watch=objective.run.watch,
    )


def _manifest(
    objective: Objective[S], entries: Mapping[str, object], selection: Mapping[str, int] | None
) -> JsonObject:
    run = objective.run
    return manifest.manifest(
        objective.command,
        plan=plain(run.settings),
        base=run.base.entry(),
        inputs=input_entries(run.frozen, run.start),
        selection=selection,
        engine=run.processes.entry() or None,
        **manifest.carry_on(entries, run.start, run.frozen or objective.teacher),
    )


def plain(settings: TrainingSettings) -> JsonObject:
    """Return the settings that decide the result, as plain data."""
    return settings.model_dump(mode="json", exclude={"out", *marked(settings, Role.HANDLING, Role.SCHEDULING)})


def first_draw(seed: int, command: str) -> int:
    """Return the seed of a LoRA's initial factors, which differs between commands.

    Adapters that start with the same A still share it after training, and seem to read the same directions.
    """
    return random.Random(f"{seed}/{command}").getrandbits(63)  # noqa: S311


def input_entries(frozen: AdapterSource | None, start: AdapterSource | None) -> list[JsonObject] | None:
    """Return the manifest's entries on the adapters that a run builds on; the one of `start_from` is marked."""
    below = [manifest.input_entry(frozen, 1.0)] if frozen else []
    return below + ([manifest.input_entry(start, 1.0) | {"use": manifest.START}] if start else []) or None


def _inputs(objective: Objective[S], entries: Mapping[str, object]) -> JsonObject:
    """Return everything besides the settings that decides the result; the dtype is the one that `auto` stands for."""
    run = objective.run
    return {
        "base_fingerprint": run.base.fingerprint,
        "base_files": files_of(run.settings.base),
        "dtype": run.base.entry()["dtype"],
        "on": run.frozen and run.frozen.digest,
        "start": run.start and run.start.digest,
        "data": entries["data"],
        "dev": entries.get("dev"),
    } | objective.inputs()
