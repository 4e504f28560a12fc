"""What gates are learned on: labelled rows, pairs without labels, or texts without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..baking.activations import texts_of
from ..errors import DataError, PlanError, UsageError
from ..evaluation.answering import Answering
from ..evaluation.head_answers import tell
from ..merging.attach import Attachment
from ..models.base import BaseModel
from ..models.positions import readable
from ..options import GenerationSettings, MergeSettings
from ..progress import Watcher
from ..tasks import ComparableTask, Task
from ..tasks.data import DataFile, read_pairs
from ..tasks.heads import HEADS, HeadRows
from ..tasks.heads.base import Predicting
from ..training.early_stopping import RowsLoss
from ..training.task import loss_of_rows
from ..training.trainer import BatchLoss
from .pair_rows import PairRows

_LONGEST = 256
_ROWS_AT_ONCE = 16


class GateData(Protocol):
    """Rows and the loss that gates follow on them."""

    @property
    def rows(self) -> Sequence[Any]:
        """The rows."""

    @property
    def files(self) -> Sequence[DataFile]:
        """Their files."""

    @property
    def labelled(self) -> Sequence[Any]:
        """The rows whose labels are used."""

    @property
    def languages(self) -> Mapping[str, set[str]]:
        """Their languages, by the role that the manifest gives them."""

    def loss(self, base: BaseModel, attached: Attachment, template: str, watch: Watcher) -> RowsLoss:
        """Return the loss of rows by their numbers.

        Args:
            base: The model, with its head if it has one.
            attached: The adapters on it, the task adapter first.
            template: Name of the prompt template where answers are generated.
            watch: Receives progress and notes.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRows:
    """Rows of the task; their loss is that of its answers."""

    task: Task
    rows: Sequence[Any]
    files: Sequence[DataFile]

    @property
    def labelled(self) -> Sequence[Any]:
        """The rows whose labels are used: all."""
        return self.rows

    @property
    def languages(self) -> Mapping[str, set[str]]:
        """Their languages, as those of a task adapter."""
        return {"supervised": {self.task.language(row) for row in self.rows}}

    def loss(self, base: BaseModel, attached: Attachment, template: str, watch: Watcher) -> RowsLoss:  # noqa: ARG002
        """Return the task's loss."""
        return _task_loss(base, self.task, self.rows, template, watch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Both sides of pairs; their loss says how far the model is from what the first adapter alone says of the second.

    Of a head it is the divergence of its probabilities, see `AgreementLoss`; generated answers of the first adapter
    are taught to both sides (sequence-level distillation: Kim and Rush, EMNLP 2016, arXiv 1606.07947).
    """

    pairs: PairRows
    files: Sequence[DataFile]
    labelled: Sequence[Any] = field(default=(), init=False)

    @property
    def rows(self) -> Sequence[Any]:
        """The rows of both sides."""
        return self.pairs.rows

    @property
    def languages(self) -> Mapping[str, set[str]]:
        """The languages of both sides, as those of an alignment adapter."""
        return {"aligned": {*self.pairs.aligned, *self.pairs.sources}}

    def loss(self, base: BaseModel, attached: Attachment, template: str, watch: Watcher) -> RowsLoss:
        """Have the first adapter alone answer the second sides, and return the loss against that."""
        task = self.pairs.task
        attached.set_weights([1.0, *[0.0] * (attached.count - 1)])
        own = self.pairs.source_rows
        if base.head:
            encoded = _encode(base, task, self.rows, watch)
            self._require_differences(tell(encoded, batch_size=_ROWS_AT_ONCE, places=own, watch=watch, label="answers"))
            return AgreementLoss(encoded, self.pairs, watch)
        how = GenerationSettings()
        asked = Answering(base, task, [self.rows[row] for row in own], how, template=template, watch=watch)
        answers = asked("task adapter alone")
        self._require_differences(answers)
        return _task_loss(base, task, self.pairs.labelled(answers), template, watch)

    def _require_differences(self, answers: Sequence[str | None]) -> None:
        """Refuse a task adapter that answers every sentence alike: all gates would agree with it."""
        self.pairs.floors(self.pairs.task.agreement(self.pairs.labelled(answers))[0], answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlabelledRows:
    """Rows whose labels are not looked at; their loss is the entropy of the head's answers."""

    rows: Sequence[Any]
    files: Sequence[DataFile]
    task: Task
    labelled: Sequence[Any] = field(default=(), init=False)
    languages: Mapping[str, set[str]] = field(default_factory=dict, init=False)

    def loss(self, base: BaseModel, attached: Attachment, template: str, watch: Watcher) -> RowsLoss:  # noqa: ARG002
        """Return the entropy of answers.

        Raises:
            PlanError: answers are generated.
        """
        if base.head is None:
            raise PlanError(NO_ENTROPY)
        return EntropyLoss(_encode(base, self.task, self.rows, watch))


NO_ENTROPY = (
    "--objective entropy needs an adapter with a head: the entropy of a generated answer is not defined without the "
    "answer. Take --objective agreement with --pairs."
)


def _encode(base: BaseModel, task: Any, rows: Sequence[Any], watch: Watcher) -> HeadRows:
    assert base.head  # noqa: S101  (for the type checker)
    most = readable(base, _LONGEST)
    encoded = HEADS[base.head.form.name].encode(base, task, rows, max_length=most)
    for note in encoded.notes:
        watch.note(note)
    return encoded


def _task_loss(base: BaseModel, task: Task, rows: Sequence[Any], template: str, watch: Watcher) -> RowsLoss:
    return loss_of_rows(base, task, rows, template=template, max_length=readable(base, _LONGEST), watch=watch)


class _HeadLoss:
    """Loss of a head's probabilities, without labels."""

    def __init__(self, encoded: HeadRows) -> None:
        if not isinstance(encoded, Predicting):
            raise PlanError(
                "gates without labels need a head of classes or tags, and this head is of another kind. "
                "Take --objective task with labelled rows."
            )
        self._encoded = encoded
        self.lengths = encoded.lengths
        self.taught = range(len(encoded.lengths))

    def _tokens(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)


class AgreementLoss(_HeadLoss):
    r"""Divergence of what the gated model says of a row from what the task adapter alone says of its source side.

    $\mathrm{KL}(p_T(s_i)\,\|\,p(x_i))$ with $s_i$ the source side of the pair that the text $x_i$ is a side of, mean
    over rows. Source sides are rows too, so gates that change them lose by it. Words of translations do not correspond
    to each other, so where words are tagged $p$ is the mean of the probabilities over the words.

    Args:
        encoded: The rows of both sides; the task adapter alone must act on the model.
        pairs: Which row is whose source side.
        watch: Receives progress.
    """

    def __init__(self, encoded: HeadRows, pairs: PairRows, watch: Watcher) -> None:
        super().__init__(encoded)
        self._teachers = pairs.teachers
        own = pairs.source_rows
        found = []
        with torch.no_grad(), watch.track("task adapter alone", len(own)) as advance:
            for first in range(0, len(own), _ROWS_AT_ONCE):
                part = own[first : first + _ROWS_AT_ONCE]
                found.append(self._pooled(part))
                advance(len(part), "")
        self._wanted = torch.cat(found)

    def _pooled(self, rows: Sequence[int]) -> Tensor:
        """Return the log of the mean probabilities over the units of each row. [rows labels]."""
        units = self._encoded.predictions(rows)
        return torch.stack([each.logsumexp(0) - math.log(len(each)) for each in units])

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the mean divergence of these rows, in nats."""
        wanted = self._wanted[[self._teachers[row] for row in rows]]
        loss = divergence(wanted, self._pooled(rows))
        return BatchLoss(loss, self._tokens(rows), terms=len(rows))

    def terms(self, rows: Sequence[int]) -> int:
        """Return the number of rows."""
        return len(rows)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the mean over rows of KL(wanted || found) of log-probabilities. Shapes: two of [rows labels]."""
    return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


class EntropyLoss(_HeadLoss):
    """Mean entropy of the head's probabilities, in nats, over texts, or over words where these are tagged.

    Reference: Yang et al., AdaMerging, ICLR 2024, arXiv 2310.02575, equation 6.
    """

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the mean entropy of these rows."""
        logs = torch.cat(self._encoded.predictions(rows))
        return BatchLoss(-(logs.exp() * logs).sum(-1).mean(), self._tokens(rows), terms=len(logs))

    def terms(self, rows: Sequence[int]) -> int:
        """Return the number of texts or words."""
        return sum(map(len, self._encoded.predictions(rows)))


def _task_rows(task: Task, arguments: Sequence[str], rows: str | None) -> LabelledRows:
    found, files = task.read(arguments, rows=rows)
    return LabelledRows(task=task, rows=found, files=files)


def _pairs(task: Task, arguments: Sequence[str], rows: str | None) -> Pairs:
    found, files = read_pairs(arguments, rows=rows)
    return Pairs(pairs=PairRows.of(task, found), files=files)


def _labelled(settings: MergeSettings, task: Task) -> GateData:
    return _task_rows(task, settings.train, settings.rows)


def _paired(settings: MergeSettings, task: Task) -> GateData:
    return _pairs(task, settings.pairs, settings.rows)


def _unlabelled(settings: MergeSettings, task: Task) -> GateData:
    if settings.train:
        found = _labelled(settings, task)
        return UnlabelledRows(rows=found.rows, files=found.files, task=task)
    if not isinstance(task, ComparableTask):
        raise UsageError(
            f"--texts are for tasks that ask about one text, and '{task.name}' is not one. Give rows with --train; "
            "their labels are not looked at."
        )
    texts, files = texts_of(settings.texts)
    if not texts:
        raise DataError("--texts must hold at least one text, and hold none.")
    return UnlabelledRows(rows=[task.unlabelled(text, "und") for text in texts], files=files, task=task)


_OBJECTIVES: Mapping[str, tuple[tuple[str, ...], Callable[[MergeSettings, Task], GateData]]] = {
    "task": (("train",), _labelled),
    "agreement": (("pairs",), _paired),
    "entropy": (("texts", "train"), _unlabelled),
}
"""By objective: the options that give its data, of which one is needed, and what reads them."""
_SOURCES = ("train", "pairs", "texts")


def lacking_data(settings: MergeSettings) -> list[str]:
    """Return the options that give the data of the objective, as one alternative, if no data are given."""
    if any(getattr(settings, name) for name in _SOURCES):
        return []
    return [" or ".join(f"--{name}" for name in _OBJECTIVES[settings.objective][0])]


def check_options(settings: MergeSettings) -> None:
    """Refuse data that the objective does not read.

    Raises:
        UsageError: data are those of another objective, or of several.
    """
    names, _ = _OBJECTIVES[settings.objective]
    given = [name for name in _SOURCES if getattr(settings, name)]
    if len(given) != 1 or given[0] not in names:
        raise UsageError(
            f"--objective {settings.objective} learns from {' or '.join(f'--{name}' for name in names)}, and "
            f"{' and '.join(f'--{name}' for name in given) or 'none'} {'are' if len(given) > 1 else 'is'} given."
        )
    if settings.dev and settings.dev_pairs:
        raise UsageError("one loss says when the gates are best: give --dev or --dev-pairs, not both.")
    if settings.rows and settings.texts:
        raise UsageError("--rows chooses rows of --train or --pairs: drop it, or cut the text files.")


def read_data(settings: MergeSettings, task: Task) -> tuple[GateData, GateData | None]:
    """Return what to learn from, and what says when gates are best if there is something.

    Raises:
        AdapterMixError: a file is missing or malformed, or does not suit the task.
    """
    data = _OBJECTIVES[settings.objective][1](settings, task)
    if settings.dev:
        return data, _task_rows(task, settings.dev, None)
    return data, _pairs(task, settings.dev_pairs, None) if settings.dev_pairs else None
