"""The data that gates are learned on: labelled rows, pairs without labels, or texts without labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import DataError, PlanError, UsageError
from ..evaluation.answering import Answering
from ..evaluation.head_answers import answers_of_head
from ..merging.attach import Attachment
from ..models.base import BaseModel
from ..models.positions import readable
from ..options import GenerationSettings, MergeSettings
from ..progress import Watcher
from ..tasks import ComparableTask, Task
from ..tasks.data import DataFile, read_pairs
from ..tasks.data.tables import Row
from ..tasks.data.texts import texts_of
from ..tasks.heads import HEADS, HeadRows
from ..tasks.heads.base import Predicting
from ..training.early_stopping import RowsLoss
from ..training.task import loss_of_rows
from ..training.trainer import BatchLoss
from .pair_rows import PairRows

_LONGEST = 256
_ROWS_AT_ONCE = 16
NO_ENTROPY = (
    "--objective entropy needs an adapter with a head: the entropy of a generated answer is not defined without the "
    "answer. Take --objective agreement with --pairs."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateData(ABC):
    """Rows and their loss.

    Args:
        task: The task.
        rows: The rows.
        files: Their files.
        languages: Their languages, by their role in the manifest.
        labelled: The rows whose labels are used.
    """

    task: Task
    rows: Sequence[Row]
    files: Sequence[DataFile]
    languages: Mapping[str, set[str]] = field(default_factory=dict)
    labelled: Sequence[Row] = ()

    @abstractmethod
    def loss(self, base: BaseModel, attached: Attachment, template: str, watch: Watcher) -> RowsLoss:
        """Return the loss of rows by their indices.

        Args:
            base: The model, with its head if it has one.
            attached: The adapters on it, the task adapter first.
            template: Name of the prompt template for generated answers.
            watch: Receives progress and notes.
        """


class LabelledRows(GateData):
    """Rows of the task, with the task's loss."""

    @classmethod
    def read(cls, task: Task, arguments: Sequence[str], rows: str | None) -> LabelledRows:
        """Read the rows of files."""
        labelled, files = task.read(arguments, rows=rows)
        languages = {"supervised": {task.language(row) for row in labelled}}
        return cls(task=task, rows=labelled, files=files, languages=languages, labelled=labelled)

    def loss(self, base: BaseModel, attached: Attachment, template: str, watch: Watcher) -> RowsLoss:  # noqa: ARG002
        """Return the task's loss."""
        return _task_loss(base, self.task, self.rows, template, watch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs(GateData):
    """Both sides of pairs; their loss is the distance from the first adapter's own answers to the second side.

    For a head it is the divergence of its probabilities, see `AgreementLoss`; generated answers of the first adapter
    are labels of both sides (sequence-level distillation: Kim and Rush, EMNLP 2016, arXiv 1606.07947).
    """

    pairs: PairRows

    @classmethod
    def read(cls, task: Task, arguments: Sequence[str], rows: str | None) -> Pairs:
        """Read the pairs of files."""
        read, files = read_pairs(arguments, rows=rows)
        pairs = PairRows.of(task, read)
        languages = {"aligned": {*pairs.aligned, *pairs.sources}}
        return cls(task=task, rows=pairs.rows, files=files, languages=languages, pairs=pairs)

    def loss(self, base: BaseModel, attached: Attachment, template: str, watch: Watcher) -> RowsLoss:
        """Compute the first adapter's answers to the second sides, and return the loss against them."""
        task, sources = self.pairs.task, self.pairs.source_rows
        attached.set_weights([1.0, *[0.0] * (attached.count - 1)])
        if base.head:
            encoded = _encode(base, task, self.rows, watch)
            answers = answers_of_head(encoded, batch_size=_ROWS_AT_ONCE, indices=sources, watch=watch, label="answers")
            self._require_differences(answers)
            return AgreementLoss(encoded, self.pairs, watch)
        rows = [self.rows[row] for row in sources]
        generated = Answering(base, task, rows, GenerationSettings(), template=template, watch=watch)(
            "task adapter alone"
        )
        self._require_differences(generated)
        return _task_loss(base, task, self.pairs.labelled(generated), template, watch)

    def _require_differences(self, answers: Sequence[str | None]) -> None:
        """Refuse a task adapter with one answer to all sentences: all gates would agree with it."""
        self.pairs.floors(self.pairs.task.agreement(self.pairs.labelled(answers))[0], answers)


class UnlabelledRows(GateData):
    """Rows without labels; their loss is the entropy of the head's answers."""

    @classmethod
    def read(cls, task: Task, settings: MergeSettings) -> UnlabelledRows:
        """Read the rows of files, without their labels, or texts."""
        if settings.train:
            rows, files = task.read(settings.train, rows=settings.rows)
            return cls(task=task, rows=rows, files=files)
        if not isinstance(task, ComparableTask):
            raise UsageError(
                f"--texts are for tasks that ask about one text, and '{task.name}' is not one. Give rows with --train; "
                "their labels are not looked at.",
                code="gates.texts-task",
            )
        texts, files = texts_of(settings.texts)
        if not texts:
            raise DataError("--texts must contain at least one text, but is empty.", code="gates.no-text")
        return cls(task=task, rows=[task.unlabelled(text, "und") for text in texts], files=files)

    def loss(self, base: BaseModel, attached: Attachment, template: str, watch: Watcher) -> RowsLoss:  # noqa: ARG002
        """Return the entropy of answers.

        Raises:
            PlanError: answers are generated.
        """
        if base.head is None:
            raise PlanError(NO_ENTROPY, code="gates.entropy")
        return EntropyLoss(_encode(base, self.task, self.rows, watch))


def _encode(base: BaseModel, task: Task, rows: Sequence[Row], watch: Watcher) -> HeadRows:
    assert base.head  # noqa: S101  (for the type checker)
    most = readable(base.model, _LONGEST)
    encoded = HEADS[base.head.form.name].encode(base, task, rows, max_length=most)
    for note in encoded.notes:
        watch.note(note)
    return encoded


def _task_loss(base: BaseModel, task: Task, rows: Sequence[Row], template: str, watch: Watcher) -> RowsLoss:
    return loss_of_rows(base, task, rows, template=template, max_length=readable(base.model, _LONGEST), watch=watch)


class _HeadLoss:
    """Loss of a head's probabilities, without labels."""

    def __init__(self, encoded: HeadRows) -> None:
        if not isinstance(encoded, Predicting):
            raise PlanError(
                "gates without labels need a head of classes or tags, and this head is of another kind. "
                "Take --objective task with labelled rows.",
                code="gates.head",
            )
        self._encoded = encoded
        self.lengths = encoded.lengths
        self.taught = range(len(encoded.lengths))

    def _tokens(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)


class AgreementLoss(_HeadLoss):
    r"""Divergence of the gated model's answers from the first adapter's own answers to the source side.

    $\mathrm{KL}(p_T(s_i)\,\|\,p(x_i))$ with $s_i$ the source side of the pair that the text $x_i$ is a side of, mean
    over rows. Source sides are rows too, so gates that change their answers have a higher loss. Words of translations
    do not correspond to each other, so for a head that tags words $p$ is the mean of the probabilities over the words.

    Args:
        encoded: The rows of both sides; only the first adapter may act on the model.
        pairs: The source side of each row.
        watch: Receives progress.
    """

    def __init__(self, encoded: HeadRows, pairs: PairRows, watch: Watcher) -> None:
        super().__init__(encoded)
        self._teachers = pairs.teachers
        sources = pairs.source_rows
        targets = []
        with torch.no_grad(), watch.track("task adapter alone", len(sources)) as advance:
            for first in range(0, len(sources), _ROWS_AT_ONCE):
                batch = sources[first : first + _ROWS_AT_ONCE]
                targets.append(self._pooled(batch))
                advance(len(batch), "")
        self._targets = torch.cat(targets)

    def _pooled(self, rows: Sequence[int]) -> Tensor:
        """Return the log of the mean probabilities over the units of each row. [rows labels]."""
        units = self._encoded.predictions(rows)
        return torch.stack([each.logsumexp(0) - math.log(len(each)) for each in units])

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the mean divergence of these rows, in nats."""
        targets = self._targets[[self._teachers[row] for row in rows]]
        loss = divergence(targets, self._pooled(rows))
        return BatchLoss(loss, self._tokens(rows), terms=len(rows))

    def terms(self, rows: Sequence[int]) -> int:
        """Return the number of rows."""
        return len(rows)


def divergence(targets: Tensor, predicted: Tensor) -> Tensor:
    """Return the mean over rows of KL(targets || predicted) of log-probabilities. Shapes: two of [rows labels]."""
    return torch.nn.functional.kl_div(predicted, targets, log_target=True, reduction="batchmean")


class EntropyLoss(_HeadLoss):
    """Mean entropy of the head's probabilities, in nats, over texts, or over words for a head that tags words.

    Reference: Yang et al., AdaMerging, ICLR 2024, arXiv 2310.02575, equation 6.
    """

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the mean entropy of these rows."""
        logs = torch.cat(self._encoded.predictions(rows))
        return BatchLoss(-(logs.exp() * logs).sum(-1).mean(), self._tokens(rows), terms=len(logs))

    def terms(self, rows: Sequence[int]) -> int:
        """Return the number of texts or words."""
        return sum(map(len, self._encoded.predictions(rows)))


_OBJECTIVES: Mapping[str, tuple[tuple[str, ...], Callable[[MergeSettings, Task], GateData]]] = {
    "task": (("train",), lambda settings, task: LabelledRows.read(task, settings.train, settings.rows)),
    "agreement": (("pairs",), lambda settings, task: Pairs.read(task, settings.pairs, settings.rows)),
    "entropy": (("texts", "train"), lambda settings, task: UnlabelledRows.read(task, settings)),
}
"""By objective: the options for its data (one is needed), and a function that reads them."""
_DATA = ("train", "pairs", "texts")


def lacking_data(settings: MergeSettings) -> list[str]:
    """Return the options for the data of the objective, as one alternative, if there are no data."""
    if any(getattr(settings, name) for name in _DATA):
        return []
    return [" or ".join(f"--{name}" for name in _OBJECTIVES[settings.objective][0])]


def check_options(settings: MergeSettings) -> None:
    """Refuse data that the objective does not read.

    Raises:
        UsageError: the data are for another objective, or for several.
    """
    names, _ = _OBJECTIVES[settings.objective]
    used = [name for name in _DATA if getattr(settings, name)]
    if len(used) != 1 or used[0] not in names:
        raise UsageError(
            f"--objective {settings.objective} learns from {' or '.join(f'--{name}' for name in names)}, and "
            f"{' and '.join(f'--{name}' for name in used) or 'none'} {'are' if len(used) > 1 else 'is'} given.",
            code="gates.data",
        )
    if settings.dev and settings.dev_pairs:
        raise UsageError(
            "one loss says when the gates are best: give --dev or --dev-pairs, not both.", code="gates.two-devs"
        )
    if settings.rows and settings.texts:
        raise UsageError(
            "--rows chooses rows of --train or --pairs: drop it, or cut the text files.", code="option.rows-unused"
        )


def read_data(settings: MergeSettings, task: Task) -> tuple[GateData, GateData | None]:
    """Return the training data, and the dev data if there are any.

    Raises:
        AdapterMixError: a file is missing or malformed, or does not suit the task.
    """
    data = _OBJECTIVES[settings.objective][1](settings, task)
    if settings.dev:
        return data, LabelledRows.read(task, settings.dev, None)
    return data, Pairs.read(task, settings.dev_pairs, None) if settings.dev_pairs else None
