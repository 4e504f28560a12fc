"""`train-joint`: one LoRA for a task and for alignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..models.base import BaseModel
from ..options import JointSettings
from ..progress import SILENT, Watcher
from .align import AlignObjective
from .early_stopping import RowsLoss
from .report import TrainReport
from .runner import Objective, Run, both, run_training
from .task import TaskObjective
from .trainer import BatchLoss, Loss, Together, count_steps

OBJECTIVES = ("task", "align")


def turn(alternate: str, number: int, accumulate: int) -> tuple[tuple[str, ...], int]:
    """Return whose turn a batch is, and which of the objective's own batches it takes.

    The task is first. "batch" is the published code: with an even count of accumulated batches every optimizer step has
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
    accumulate, position = settings.accumulate, OBJECTIVES.index(name)

    def together(number: int) -> list[int]:
        step = number // accumulate
        if not settings.discard and settings.alternate == "step":
            step = 2 * step + position
        elif not settings.discard and settings.alternate == "batch":
            step = (2 * number + position) // accumulate
        return _own_numbers(settings, name, step)

    return together


def _own_numbers(settings: JointSettings, name: str, step: int) -> list[int]:
    """Return the numbers, among its own, of the batches that an objective has in an optimizer step."""
    batches = range(step * settings.accumulate, (step + 1) * settings.accumulate)
    turns = [(turn(settings.alternate, number, settings.accumulate), number) for number in batches]
    return [number if settings.discard else part for (names, part), number in turns if name in names]


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
        names, part_number = turn(self._settings.alternate, number, self._settings.accumulate)
        if self._settings.discard:
            part_number = number
        accumulate = self._settings.accumulate
        share = {name: len(_own_numbers(self._settings, name, number // accumulate)) / accumulate for name in names}
        batches = {name: BatchLoss(*self._losses[name](part_number)) for name in names}
        rows = {name: batch.rows or self._settings.batch_size for name, batch in batches.items()}
        return BatchLoss(
            sum(self._weights[name] * share[name] * batch.loss for name, batch in batches.items()),  # type: ignore[arg-type]
            sum(batch.tokens for batch in batches.values()),
            {
                part: entry
                for name, batch in batches.items()
                for part, entry in (batch.parts or {name: (batch.loss, rows[name])}).items()
            },
            rows=sum(rows.values()),
        )


class WithSum:
    """Dev losses, and where there are those of both objectives their sum, weighted as in training."""

    def __init__(self, losses: Callable[[], dict[str, float]], align_weight: float) -> None:
        self._losses, self._weights = losses, {"dev_align_loss": align_weight}

    def __call__(self) -> dict[str, float]:
        values = self._losses()
        losses = {name: value for name, value in values.items() if name.endswith("_loss")}
        if len(losses) < len(OBJECTIVES):
            return values
        return values | {"dev_sum_loss": sum(self._weights.get(name, 1.0) * loss for name, loss in losses.items())}


def _turns(settings: JointSettings) -> int:
    """Return how many objectives take turns, so that an epoch of the task takes as many times the steps."""
    return 1 if settings.alternate == "sum" or settings.discard else 2


def joint_steps(rows: int, settings: JointSettings) -> int:
    """Return the optimizer steps: in each epoch the task sees every row, unless rows are skipped."""
    return (1 if settings.steps else _turns(settings)) * count_steps(rows, settings)


class JointObjective(Objective[JointSettings]):
    """A task and alignment in turns, as two objectives."""

    command = "train-joint"

    def __init__(self, run: Run[JointSettings]) -> None:
        super().__init__(run)
        self.task, self.align = TaskObjective(run), AlignObjective(run)
        self.selects = f"dev_{run.settings.select}_loss"
        self.turns = _turns(run.settings)

    def read(self) -> None:
        self.task.read()
        self.align.read()
        self.report = self.task.report
        self.measure = "dev_task_loss" if self.task.data.dev else "dev_align_accuracy"

    def check(self) -> None:
        self.task.check()

    def notes(self) -> list[str]:
        return self.task.notes() + self.align.notes()

    def load(self) -> BaseModel:
        return self.task.load()

    def prepare(self) -> None:
        self.task.prepare()
        self.align.prepare()

    def rows(self) -> int:
        return self.task.rows()

    def steps(self) -> int:
        return joint_steps(self.rows(), self.run.settings)

    def dev(self) -> dict[str, RowsLoss]:
        sides = {"dev_task_loss": self.task.dev(), "dev_align_loss": self.align.dev()}
        return {name: loss for name, losses in sides.items() for loss in losses.values()}

    def dev_values(self) -> Callable[[], dict[str, float]] | None:
        values = super().dev_values()
        return WithSum(values, self.run.settings.align_weight) if values else None

    def entries(self) -> Mapping[str, object]:
        task, align = self.task.entries(), self.align.entries()
        files = {
            "data": both(task["data"], align["data"]),
            "dev": both(task["dev"], align["dev"]),
            "tested": both(task["tested"], align["tested"]),
        }
        # `rows` of the manifest counts the task's rows, so the counts of pairs go with the alignment.
        objective = align["objective"] | {"rows": align["rows"]}
        languages = task["languages"] | align["languages"]
        return {**task, **files, "languages": languages, "objective": objective, "vectors": align["vectors"]}

    def loss(self, together: Together | None = None) -> JointLoss:  # noqa: ARG002  (it decides itself)
        parts: dict[str, Loss] = {
            "align": self.align.loss(own_batches(self.run.settings, "align")),
            "task": self.task.loss(own_batches(self.run.settings, "task")),
        }
        return JointLoss(parts, self.run.settings)

    def dry_run(self) -> TrainReport:
        return replace(super().dry_run(), pairs=self.align.report)


def train_joint(settings: JointSettings, *, watch: Watcher = SILENT, callbacks: Sequence[object] = ()) -> TrainReport:
    """Train one LoRA on a task and on parallel pairs, the objectives taking turns.

    The alignment loss acts at block L, where its batches stop; the task's run through the whole model. Dev losses are
    measured for the objectives that have dev data. The task's loss alone decides about early stopping, unless `select`
    says otherwise.

    Args:
        settings: The run's settings.
        watch: Receives progress.
        callbacks: Objects with methods of transformers' `TrainerCallback`; see `training.callbacks.Callbacks`.

    Raises:
        AdapterMixError: invalid model, data file, setting or output.
    """
    return run_training(JointObjective, settings, watch=watch, callbacks=callbacks)
