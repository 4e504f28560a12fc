"""Alignment by distillation: states of other languages move to the frozen base's states of English."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from ..models.base import BaseModel
from ..models.eval_mode import evaluating, loras_off, train_loras_only
from ..models.pooling import MeanAndEdge, Pooler
from ..options import AlignSettings, JointSettings
from ..progress import SILENT, Watcher
from ..tasks.data import Pair
from .by_length import vectors_by_length
from .layer_states import CHUNKS, MiddleStates
from .losses import distil_loss, retrieved, spread_of
from .pairs import PairsLoss, encode_side, pair_groups
from .parallel import ALONE, Processes
from .sampler import Sampler
from .trainer import BatchLoss, Together, in_a_row

ENGLISH_EVERY = 4
"""One in four sentences of the batches is a target, whose states should not move."""


class AlignmentLoss(Protocol):
    """Loss of batches of pairs, by batch number."""

    def __call__(self, number: int) -> BatchLoss:
        """Return the part of a batch."""

    @property
    def of_rows(self) -> PairsLoss:
        """Loss of pairs by their numbers, for dev data."""


class PairOptions(TypedDict, total=False):
    """Arguments of `PairLoss` by name."""

    layer: int | None
    processes: Processes
    watch: Watcher
    like: Sequence[Pair] | None
    together: Together | None


class PairLoss(ABC):
    """Loss of a batch of pairs, by batch number, on states in the middle of the model.

    Args:
        base: The base model with its LoRA in.
        pairs: The pairs.
        settings: The run's settings.
        layer: Number of blocks to run; default all that the model has.
        processes: Those that share each batch; their precision applies to measurements before training too.
        watch: Receives progress, and notes on sentences that are too long.
        like: Pairs whose means and spreads a loss uses; default the pairs.
        together: From a batch number to the batches of the same optimizer step; default `accumulate` in a row. The
            step takes the mean over all of their sentences.
    """

    def __init__(
        self,
        base: BaseModel,
        pairs: Sequence[Pair],
        settings: AlignSettings | JointSettings,
        *,
        layer: int | None = None,
        processes: Processes = ALONE,
        watch: Watcher = SILENT,
        like: Sequence[Pair] | None = None,
        together: Together | None = None,
    ) -> None:
        self._settings, self._base, self._model, self._processes = settings, base, base.model, processes
        self._together = together or in_a_row(settings.accumulate)
        # shares may differ in rows, and must not in the number of runs
        chunks = 1 if processes.sharded else CHUNKS
        self._states = MiddleStates(base, layer, chunks=chunks, pool=self._pooler())
        self._source_ids, self._target_ids = (
            encode_side(base, pairs, side, settings.max_length, watch) for side in ("source", "target")
        )
        self._sampler = Sampler(
            groups=pair_groups(pairs, settings.balance), batch_size=settings.batch_size, seed=settings.seed
        )
        self._prepare(pairs, like, watch)

    @abstractmethod
    def _pooler(self) -> Pooler:
        """Return the function that makes vectors of states."""

    @abstractmethod
    def _prepare(self, pairs: Sequence[Pair], like: Sequence[Pair] | None, watch: Watcher) -> None:
        """Measure what the loss needs, and set the modes of the model."""

    @abstractmethod
    def __call__(self, number: int) -> BatchLoss:
        """Return the part of a batch."""

    @abstractmethod
    def _of_rows(self, rows: Sequence[int]) -> BatchLoss:
        """Return the loss of some pairs, with hits, for dev data."""

    @property
    def of_rows(self) -> PairsLoss:
        return PairsLoss(self._of_rows, [len(ids) for ids in self._source_ids])


Item = tuple[int, bool]
"""Number of a pair, and whether its target side replaces its source side."""


class DistilLoss(PairLoss):
    """Loss of a batch of sentences, by batch number: distance from the frozen base's states of their translations.

    Of every four sentences in the batches three are sources of pairs, and one is a target. The states of all targets
    are computed once, without dropout and without this LoRA; with `on_top_of` that adapter belongs to the frozen base.
    In training the base's share dropout is off, since it moves the first token further than sentences differ. Distances
    are measured in the spread of the targets of `like`. See `PairLoss` for the arguments.

    Reference: the objective is this project's; targets of a frozen teacher are those of Reimers and Gurevych, EMNLP
    2020, arXiv 2004.09813, there for the output of a sentence encoder.
    """

    def _pooler(self) -> Pooler:
        return MeanAndEdge(self._base.tokenizer, kind=self._base.kind, exclude_bos=self._settings.exclude_bos)

    def _prepare(self, pairs: Sequence[Pair], like: Sequence[Pair] | None, watch: Watcher) -> None:  # noqa: ARG002
        self._targets, self._index = self._teach(self._target_ids, watch)
        spread_from = self._targets
        if like:
            theirs = encode_side(self._base, like, "target", self._settings.max_length, SILENT)
            spread_from = self._teach(theirs, watch)[0]
        self._spread = spread_of(spread_from)
        train_loras_only(self._model)

    def _teach(self, encoded: Sequence[Sequence[int]], watch: Watcher) -> tuple[Tensor, list[int]]:
        """Return the frozen base's vectors of all different sentences, and the index of each sentence among them."""
        numbers: dict[tuple[int, ...], int] = {}
        index = [numbers.setdefault(tuple(ids), len(numbers)) for ids in encoded]
        texts = list(map(list, numbers))
        with (
            torch.no_grad(),
            evaluating(self._model),
            loras_off(self._model),
            self._processes.autocast(),
            watch.track("states of the frozen base", len(texts)) as advance,
        ):
            targets = vectors_by_length(
                lambda rows: self._states.pooled([texts[row] for row in rows]), list(map(len, texts)), advance
            )
        return targets, index

    def items(self, number: int) -> list[Item]:
        """Return the sentences of batch `number`: pairs, and of each whether its target side is taken."""
        start = number * self._sampler.batch_size
        return [
            (row, position % ENGLISH_EVERY == ENGLISH_EVERY - 1)
            for position, row in enumerate(self._sampler.batch(number), start)
        ]

    def _encoded(self, items: Sequence[Item]) -> list[list[int]]:
        return [(self._target_ids if is_target else self._source_ids)[row] for row, is_target in items]

    def _of_items(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of some sentences, their vectors and their targets."""
        states = self._states.pooled(self._encoded(items))
        targets = self._targets[[self._index[row] for row, _ in items]].to(states.device)
        return distil_loss(states, targets, self._spread.to(states.device)), states, targets

    def __call__(self, number: int) -> BatchLoss:
        items = self.items(number)
        share = self._processes.share(items)
        whole = len(self._together(number)) * len(items)
        loss = self._of_items(share)[0] * self._processes.part(len(share), items, whole)
        return BatchLoss(loss, sum(map(len, self._encoded(share))), rows=len(items))

    def _of_rows(self, rows: Sequence[int]) -> BatchLoss:
        items = [(row, False) for row in rows]
        loss, states, targets = self._of_items(items)
        indices = torch.tensor([self._index[row] for row in rows], device=states.device)
        half = states.shape[1] // 2  # the means
        hits = retrieved(states[:, :half], targets[:, :half], indices[:, None] == indices)
        return BatchLoss(loss, sum(map(len, self._encoded(items))), rows=len(rows), hits=hits)


class BothLosses:
    """Sum of two losses of the same pairs, by batch number.

    Args:
        contrastive: The contrastive loss.
        distil: The loss of the distillation, made last, so that the base's share dropout is off for both.
    """

    def __init__(self, contrastive: AlignmentLoss, distil: AlignmentLoss) -> None:
        self._losses = {"contrastive": contrastive, "distil": distil}

    def __call__(self, number: int) -> BatchLoss:
        return self._sum({name: loss(number) for name, loss in self._losses.items()})

    @staticmethod
    def _sum(losses: Mapping[str, BatchLoss]) -> BatchLoss:
        contrastive, distil = losses["contrastive"], losses["distil"]
        # with a keeper the contrastive loss is a sum of two means over unlike terms, and a log entry for each
        parts = {
            "contrastive": contrastive.parts.get("align", (contrastive.loss, contrastive.rows or 0)),
            **{name: part for name, part in contrastive.parts.items() if name != "align"},
            "distil": (distil.loss, distil.rows or 0),
        }
        means = contrastive.means and ((contrastive.means[0][0] + distil.loss.detach(), contrastive.means[0][1]),)
        return BatchLoss(
            contrastive.loss + distil.loss,
            contrastive.tokens + distil.tokens,
            parts,
            rows=contrastive.rows,
            hits=contrastive.hits,
            means=(*means, *contrastive.means[1:]),
        )

    @property
    def of_rows(self) -> PairsLoss:
        sides = {name: loss.of_rows for name, loss in self._losses.items()}
        return PairsLoss(
            lambda rows: self._sum({name: side(rows) for name, side in sides.items()}), sides["contrastive"].lengths
        )
