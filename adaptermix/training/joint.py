"""`train-joint`: one LoRA for a task and for alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.positions import within_positions
from ..options import JointSettings
from ..progress import SILENT, Watcher
from ..tasks.data import DataFile, Pair, read_pairs
from ..tasks.data.report import RowsReport
from ..tasks.splits import DEV, TRAINING, refuse_tested
from .align import alignment_loss, negatives
from .dry_run import aligned_layer
from .early_stopping import DevLosses, DevWatch, RowsLoss
from .frozen_adapter import attach_on
from .pairs import describe_pairs, read_dev_pairs, require_pairs
from .parallel import Processes, in_processes
from .run import TrainReport, check_before, dry_report, train, vectors_entry
from .start_from import fit_start, open_start
from .task import TaskData, TaskLoss
from .trainer import BatchLoss, Loss, Together, count_steps

OBJECTIVES = ("task", "align")


def turn(alternate: str, number: int, accumulate: int) -> tuple[tuple[str, ...], int]:
    """Return whose turn a batch is, and which of the objective's own batches it takes.

    The task begins. "batch" is the published code: with an even count of accumulated batches every optimizer step holds
    both. "step" is the paper's text: every optimizer step is for one objective alone. "sum" adds both losses.

    Args:
        alternate: "batch", "step" or "sum".
        number: Number of the batch, over the whole run.
        accumulate: Batches per optimizer step.

    Reference: Liu and Niehues, ACL 2025, arXiv 2502.14830, section 3, and their release.
    """
    if alternate == "sum":
        return OBJECTIVES, number
    if alternate == "batch":
        return (OBJECTIVES[number % 2],), number // 2
    step, part = divmod(number, accumulate)
    return (OBJECTIVES[step % 2],), step // 2 * accumulate + part


def own_batches(settings: JointSettings, name: str) -> Together:
    """Return a function from a batch number of an objective to all its batches of the same optimizer step."""
    accumulate, place = settings.accumulate, OBJECTIVES.index(name)

    def together(own: int) -> list[int]:
        step = own // accumulate
        if not settings.discard and settings.alternate == "step":
            step = 2 * step + place
        elif not settings.discard and settings.alternate == "batch":
            step = (2 * own + place) // accumulate
        return _own_numbers(settings, name, step)

    return together


def _own_numbers(settings: JointSettings, name: str, step: int) -> list[int]:
    """Return the numbers, among its own, of the batches that an objective has in an optimizer step."""
    batches = range(step * settings.accumulate, (step + 1) * settings.accumulate)
    turns = [(turn(settings.alternate, number, settings.accumulate), number) for number in batches]
    return [number if settings.discard else own for (names, own), number in turns if name in names]


class JointLoss:
    """Loss of the objective whose turn it is, by batch number: its part of the loss of an optimizer step.

    Where batches of a step belong to different objectives, each objective has the share of its batches.

    Args:
        losses: Loss of each objective, by its own batch numbers.
        settings: The run's settings.
    """

    def __init__(self, losses: dict[str, Loss], settings: JointSettings) -> None:
        self._losses, self._settings = losses, settings
        self._weights = {"task": 1.0, "align": settings.align_weight}

    def __call__(self, number: int) -> BatchLoss:
        """Return the loss of batch `number`."""
        names, own = turn(self._settings.alternate, number, self._settings.accumulate)
        if self._settings.discard:
            own = number
        accumulate = self._settings.accumulate
        share = {name: len(_own_numbers(self._settings, name, number // accumulate)) / accumulate for name in names}
        found = {name: BatchLoss(*self._losses[name](own)) for name in names}
        rows = {name: batch.rows or self._settings.batch_size for name, batch in found.items()}
        return BatchLoss(
            sum(self._weights[name] * share[name] * batch.loss for name, batch in found.items()),  # type: ignore[arg-type]
            sum(batch.tokens for batch in found.values()),
            {
                part: entry
                for name, batch in found.items()
                for part, entry in (batch.parts or {name: (batch.loss, rows[name])}).items()
            },
            rows=sum(rows.values()),
        )


class WithSum:
    """Dev losses, and where there are those of both objectives their sum, weighted as in training."""

    def __init__(self, losses: DevLosses, align_weight: float) -> None:
        self._losses, self._weights = losses, {"dev_align_loss": align_weight}

    def __call__(self) -> dict[str, float]:
        """Measure."""
        found = self._losses()
        losses = {name: value for name, value in found.items() if name.endswith("_loss")}
        if len(losses) < len(OBJECTIVES):
            return found
        return found | {"dev_sum_loss": sum(self._weights.get(name, 1.0) * loss for name, loss in losses.items())}


def _turns(settings: JointSettings) -> int:
    """Return how many objectives take turns, so that a pass over the task's rows takes as many times the steps."""
    return 1 if settings.alternate == "sum" or settings.discard else 2


def joint_steps(rows: int, settings: JointSettings) -> int:
    """Return the optimizer steps: in each pass the task sees every row, unless rows are passed over."""
    return (1 if settings.steps else _turns(settings)) * count_steps(rows, settings)


def train_joint(settings: JointSettings, *, watch: Watcher = SILENT) -> TrainReport:
    """Train one LoRA on a task and on parallel pairs, the objectives taking turns.

    The alignment loss acts at block L, where its batches stop; the task's run through the whole model. Dev losses are
    measured of the objectives that have dev data. That of the task alone decides about early stopping, unless `select`
    says otherwise.

    Raises:
        AdapterMixError: the model, a data file, a setting or the output does not do.
    """
    return in_processes(_train_joint, settings, watch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """Pairs to train on and to look at, their files, and what the manifest says of test data among them."""

    train: Sequence[Pair]
    dev: Sequence[Pair]
    files: Sequence[DataFile]
    dev_files: Sequence[DataFile]
    tested: Sequence[Mapping[str, Any]]
    report: RowsReport

    @classmethod
    def read(cls, settings: JointSettings, watch: Watcher) -> _Pairs:
        pairs, files = read_pairs(settings.pairs, rows=settings.pair_rows)
        require_pairs(pairs)
        dev, dev_files = read_dev_pairs(settings)
        tested = refuse_tested({TRAINING: files, DEV: dev_files}, allowed=settings.allow_tested, watch=watch)
        report = describe_pairs(pairs, files, dev)
        return cls(train=pairs, dev=dev, files=files, dev_files=dev_files, tested=tested, report=report)


def _entries(
    of_task: Mapping[str, Any], pairs: _Pairs, settings: JointSettings, blocks: tuple[int, int]
) -> dict[str, Any]:
    """Return the manifest's entries; `blocks` are the numbers of blocks below the alignment loss and of the model."""
    objective = {"name": settings.objective, "layer": blocks[0], "layers": blocks[1], "pairs": len(pairs.train)}
    return {
        **of_task,
        "languages": of_task["languages"] | {"aligned": _languages(pairs.train)},
        "data": [*of_task["data"], *(file.entry() for file in pairs.files)],
        "dev": [*(of_task["dev"] or []), *(file.entry() for file in pairs.dev_files)] or None,
        "tested": [*(of_task["tested"] or []), *pairs.tested] or None,
        "objective": objective | {"rows": pairs.report.document()},
        "vectors": vectors_entry(settings),
    }


def _train_joint(settings: JointSettings, watch: Watcher, processes: Processes) -> TrainReport:
    check_before(settings)
    settings, start = open_start(settings)
    data = TaskData.read(settings, start, watch)
    read = _Pairs.read(settings, watch)
    pairs, dev_pairs = read.train, read.dev
    steps = joint_steps(len(data.train), settings)
    if settings.dry_run:
        data.head(settings)
        return dry_report(settings, steps, rows=data.report, pairs=read.report, start=start)
    for note in [*data.warnings(), *read.report.warnings("pairs")]:
        watch.note(note)
    if processes.count > 1 and settings.objective != "distil":
        watch.note(negatives(settings, processes))
    base = data.load(settings, processes)
    settings = within_positions(base, settings, watch)
    start = start and fit_start(base.model, start, settings, fingerprint=base.fingerprint)
    on = attach_on(base.model, settings, headed=base.head is not None)
    rows = data.objective(base, data.train, settings.max_length, watch)
    steps = joint_steps(len(rows.taught), settings)
    total = base.layers
    layer = aligned_layer(base.model, settings, whole=True)
    base.model.train()

    def losses() -> JointLoss:
        align = alignment_loss(
            base,
            pairs,
            settings,
            layer=layer,
            processes=processes,
            watch=watch,
            together=own_batches(settings, "align"),
        )
        task = TaskLoss(rows, settings, processes, together=own_batches(settings, "task"))
        return JointLoss({"task": task, "align": align}, settings)

    sides: dict[str, RowsLoss] = {}
    if data.dev:
        sides["dev_task_loss"] = data.objective(base, data.dev, settings.max_length, watch)
    if dev_pairs:
        judge = alignment_loss(base, dev_pairs, settings, layer=layer, processes=processes, like=pairs)
        sides["dev_align_loss"] = judge.of_rows
    return train(
        base,
        settings,
        losses,
        steps=steps,
        kind="train-joint",
        entries=_entries(data.manifest(base, rows), read, settings, (layer, total)),
        layers=None,
        watch=watch,
        on=on,
        start=start,
        dev=_watched(DevLosses(base, sides, settings, processes), data, settings, len(rows.taught), watch)
        if sides
        else None,
        processes=processes,
    )


def _watched(losses: DevLosses, data: TaskData, settings: JointSettings, rows: int, watch: Watcher) -> DevWatch:
    """Return what looks at the dev losses after each pass over the task's `rows` rows."""
    return DevWatch(
        WithSum(losses, settings.align_weight),
        settings,
        steps=joint_steps(rows, settings),
        rows=rows,
        key=f"dev_{settings.select}_loss",
        turns=_turns(settings),
        measure="dev_task_loss" if data.dev else "dev_align_accuracy",
        watch=watch,
    )


def _languages(pairs: Sequence[Pair]) -> list[str]:
    return sorted({language for pair in pairs for language in pair.languages})
