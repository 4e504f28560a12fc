"""`train-joint`: one LoRA for a task and for alignment."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import Pair, read_pairs
from ..progress import SILENT, Watcher
from ..settings import JointSettings
from ..splits import DEV, TRAINING, refuse_tested
from .align import AlignLoss, describe_pairs, negatives, read_dev_pairs, require_pairs, vectors_entry
from .on_top import attach_on
from .outline import aligned_layer
from .parallel import Processes, in_processes
from .run import TrainReport, check_before, dry_report, train
from .selection import DevLosses, DevWatch, RowsLoss
from .starting import fit_start, open_start
from .task import TaskData, TaskLoss
from .trainer import BatchLoss, Loss, count_steps

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


class JointLoss:
    """Loss of the objective whose turn it is, by batch number.

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
        found = {name: BatchLoss(*self._losses[name](own)) for name in names}
        rows = {name: batch.rows or self._settings.batch_size for name, batch in found.items()}
        return BatchLoss(
            sum(self._weights[name] * batch.loss for name, batch in found.items()),  # type: ignore[arg-type]
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


def _train_joint(settings: JointSettings, watch: Watcher, processes: Processes) -> TrainReport:
    check_before(settings)
    settings, start = open_start(settings)
    data = TaskData.read(settings, start, watch)
    pairs, pair_files = read_pairs(settings.pairs, rows=settings.pair_rows)
    require_pairs(pairs)
    dev_pairs, dev_files = read_dev_pairs(settings)
    tested = refuse_tested({TRAINING: pair_files, DEV: dev_files}, allowed=settings.allow_tested, watch=watch)
    pairs_report = describe_pairs(pairs, pair_files, dev_pairs)
    steps = joint_steps(len(data.train), settings)
    if settings.dry_run:
        data.head(settings)
        return dry_report(settings, steps, rows=data.report, pairs=pairs_report, start=start)
    for note in [*data.warnings(), *pairs_report.warnings("pairs")]:
        watch.note(note)
    if processes.count > 1:
        watch.note(negatives(settings, processes))
    base = data.load(settings, processes)
    start = start and fit_start(base.model, start, settings, fingerprint=base.fingerprint)
    on = attach_on(base.model, settings, headed=base.head is not None)
    rows = data.objective(base, data.train, settings.max_length, watch)
    total = base.layers
    layer = aligned_layer(base.model, settings, whole=True)
    base.model.train()

    def losses() -> JointLoss:
        align = AlignLoss(base, pairs, settings, layer=layer, processes=processes, watch=watch)
        return JointLoss({"task": TaskLoss(rows, settings, processes), "align": align}, settings)

    sides: dict[str, RowsLoss] = {}
    if data.dev:
        sides["dev_task_loss"] = data.objective(base, data.dev, settings.max_length, watch)
    if dev_pairs:
        judge = AlignLoss(base, dev_pairs, settings, layer=layer, processes=processes, like=pairs)
        sides["dev_align_loss"] = judge.of_rows
    return train(
        base,
        settings,
        losses,
        steps=steps,
        kind="train-joint",
        entries=data.manifest(base)
        | {
            "languages": data.entries["languages"] | {"aligned": _languages(pairs)},
            "data": [*data.entries["data"], *(file.entry() for file in pair_files)],
            "dev": [*(data.entries["dev"] or []), *(file.entry() for file in dev_files)] or None,
            "tested": [*(data.entries["tested"] or []), *tested] or None,
            "objective": {"name": "contrastive", "layer": layer, "layers": total, "pairs": len(pairs)}
            | {"rows": pairs_report.document()},
            "vectors": vectors_entry(settings),
        },
        layers=None,
        watch=watch,
        on=on,
        start=start,
        dev=_watched(DevLosses(base, sides, settings, processes), data, settings, watch) if sides else None,
        processes=processes,
    )


def _watched(losses: DevLosses, data: TaskData, settings: JointSettings, watch: Watcher) -> DevWatch:
    """Return what looks at the dev losses after each pass over the task's rows."""
    rows = len(data.train)
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
