"""The alignment objective: the contrastive loss, the choice of losses, and `train-align`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, Unpack

import torch
from torch import Tensor

from ..io.json_types import JsonObject
from ..models.base import BaseModel
from ..models.blocks import keep_blocks
from ..models.eval_mode import evaluating, loras_off
from ..models.pooling import Pooler, Standards, mean_cosine, require_pooling
from ..options import AlignSettings, JointSettings
from ..options.training import MOVING
from ..progress import Watcher
from ..tasks.data import Pair
from .distil import AlignmentLoss, BothLosses, DistilLoss, PairLoss, PairOptions
from .dry_run import aligned_layer
from .early_stopping import RowsLoss
from .losses import contrastive_loss, keeper_loss, retrieved
from .pairs import PairData, pair_groups
from .parallel import ALONE, Processes
from .runner import DataEntries, Objective
from .trainer import BatchLoss, Together

STANDARD_PAIRS, CROWD_PAIRS = 64, 16
"""Pairs of each two languages that are measured to standardise, and to see whether that is needed."""
CROWDED = 0.98
"""Mean cosine of unlike sentences above which a contrastive loss sees next to nothing."""


class AlignLoss(PairLoss):
    """Loss of a batch of pairs, by batch number: contrastive, and with `keeper` times the keeper's loss added.

    The frozen base's states of the targets are computed once for both uses: as a fixed teacher and for the keeper. The
    frozen base is the model without this LoRA: an adapter in `on_top_of` belongs to it, one in `start_from` does not.
    The teacher has no dropout. The model in training has, also in an encoder's layers, which bounds the keeper's loss
    from below. The mean of the keeper is over tokens. Each pair is contrasted with the others of its batch, so more
    batches per step are not the same as a larger one. `like` are pairs whose sentences are measured to standardise. See
    `PairLoss` for the arguments.
    """

    def _pooler(self) -> Pooler:
        settings = self._settings
        return Pooler(
            self._base.tokenizer,
            pooling=settings.pooling,
            exclude_bos=settings.exclude_bos,
            standardize=settings.standardize,
        )

    def _prepare(self, pairs: Sequence[Pair], like: Sequence[Pair] | None, watch: Watcher) -> None:
        settings = self._settings
        require_pooling(settings.pooling, self._base.kind)
        self._targets = [pair.target for pair in pairs]
        self._languages = [pair.languages for pair in pairs]
        measured = self._sample(like or pairs, STANDARD_PAIRS) if settings.standardize != "none" else {}
        self._standards = Standards(
            settings.standardize, {language: [vectors] for language, vectors in measured.items()}
        )
        if self._standards:
            for language in {language for pair in pairs for language in pair.languages}:
                self._standards[language]  # refuses one that was not measured
        # With PiSSA and OLoRA the base lacks a part of its weights; for dev pairs the note would be a duplicate.
        elif (
            settings.init not in MOVING
            and like is None
            and (alike := mean_cosine(self._sample(pairs, CROWD_PAIRS))) > CROWDED
        ):
            watch.note(
                f"warning: unlike sentences have a mean cosine of {alike:.3f} in the base model: the loss hardly "
                "separates them, and may do more harm than good. --standardize removes their common component."
            )
        self._model.train()

    def _sample(self, pairs: Sequence[Pair], most: int) -> dict[str, Tensor]:
        """Return the frozen base's vectors of both sides of some pairs, evenly spaced, by language.

        Shapes: each [sentences width].
        """
        texts: dict[str, list[str]] = {}
        for rows in pair_groups(pairs, "languages"):
            count = min(len(rows), most)
            for pair in (pairs[rows[number * len(rows) // count]] for number in range(count)):
                for language, text in zip(pair.languages, (pair.source, pair.target), strict=True):
                    texts.setdefault(language, []).append(text)
        vectors = {}
        for language, sentences in texts.items():
            spoken, most_tokens = [language] * len(sentences), self._settings.max_length
            rows_of = self._base.encode(sentences, spoken, truncation=True, max_length=most_tokens)
            encoded = [row["input_ids"] for row in rows_of]
            parts = [encoded[start : start + CROWD_PAIRS] for start in range(0, len(encoded), CROWD_PAIRS)]
            with self._processes.autocast():  # as in training, or z-scores would be of another model
                vectors[language] = torch.cat([self._of_base(part)[0] for part in parts])
        return vectors

    def _scored(self, vectors: Tensor, rows: Sequence[int], side: int) -> Tensor:
        """Return the vectors of one side of some pairs, as z-scores if `standardize` is set."""
        if not self._standards:
            return vectors
        return torch.stack(
            [self._standards[self._languages[row][side]](vector) for row, vector in zip(rows, vectors, strict=True)]
        )

    def _of_base(self, encoded: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Return vectors and token states of the frozen base."""
        with torch.no_grad(), evaluating(self._model), loras_off(self._model):
            return self._states.read(encoded, range(len(encoded) if self._settings.keeper else 0))

    def _sides(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the vectors of both sides, and the keeper's loss if there is a keeper."""
        source, target = ([side[row] for row in rows] for side in (self._source_ids, self._target_ids))
        count, keeper, fixed = len(rows), self._settings.keeper > 0, self._settings.anchor == "base"
        of_base = self._of_base(target) if keeper or fixed else None
        if fixed and of_base and not keeper:
            return self._states.pooled(source), of_base[0], None
        both, tokens = self._states.read([*source, *target], range(count, 2 * count) if keeper else range(0))
        theirs = of_base[0] if fixed and of_base else both[count:]
        if self._settings.stop_gradient:
            theirs = theirs.detach()
        if not (keeper and of_base):
            return both[:count], theirs, None
        return both[:count], theirs, keeper_loss(tokens, of_base[1])

    def _kept_tokens(self, rows: Sequence[int]) -> int:
        """Return how many tokens the keeper's loss of these pairs is a mean over."""
        return sum(self._states.count(self._target_ids[row]) for row in rows)

    def _of_rows(self, rows: Sequence[int]) -> BatchLoss:
        return self._part(rows, looks=True)

    def _part(
        self,
        rows: Sequence[int],
        processes: Processes = ALONE,
        *,
        among: Sequence[Sequence[int]] | None = None,
        looks: bool = False,
    ) -> BatchLoss:
        """Return these pairs' part of a loss; of several processes, this one's part; with a look also the hits.

        Args:
            rows: The pairs of a batch.
            processes: Those that share the batch.
            among: All batches that the loss is a mean over; default this one alone.
            looks: Whether to count hits.
        """
        share, among = processes.share(rows), among or [rows]
        source, target, kept = self._sides(share)
        source, target = self._scored(source, share, 0), self._scored(target, share, 1)
        loss = self._contrast(source, target, rows, processes, sum(map(len, among)))
        hits = retrieved(source.detach(), target.detach(), self._same(share).to(source.device)) if looks else None
        tokens = sum(len(side[row]) for side in (self._source_ids, self._target_ids) for row in share)
        if kept is None:
            return BatchLoss(loss, tokens, rows=len(rows), hits=hits)
        kept = kept * processes.part(self._kept_tokens(share), rows, sum(map(self._kept_tokens, among)))
        parts = {"align": (loss, len(rows)), "keeper": (kept, len(rows))}
        weight = self._settings.keeper
        means = ((loss.detach(), len(rows)), (weight * kept.detach(), self._kept_tokens(share)))
        return BatchLoss(loss + weight * kept, tokens, parts, rows=len(rows), hits=hits, means=means)

    def _contrast(
        self, source: Tensor, target: Tensor, rows: Sequence[int], processes: Processes, whole: int
    ) -> Tensor:
        """Return the part that the vectors of this process's share have in the mean over `whole` pairs."""
        shares = processes.shares(rows)
        gathered = self._settings.gather_negatives and processes.gathers(rows)
        if gathered:
            source, target = (processes.gather(side, rows) for side in (source, target))
        order = [row for share in shares for row in share] if gathered else shares[processes.rank]
        loss = contrastive_loss(
            source,
            target,
            temperature=self._settings.temperature,
            symmetric=self._settings.symmetric,
            same=self._same(order).to(source.device) if self._settings.mask_duplicates else None,
        )
        if gathered:
            return processes.common(loss) * (len(rows) / whole)
        return loss * processes.part(len(order), rows, whole)

    def __call__(self, number: int) -> BatchLoss:
        among = [self._batch(other) for other in self._together(number)]
        return self._part(self._batch(number), self._processes, among=among)

    def _batch(self, number: int) -> list[int]:
        # A row that is drawn twice would be its own negative.
        return list(dict.fromkeys(self._sampler.batch(number)))

    def _same(self, rows: Sequence[int]) -> Tensor:
        texts = [self._targets[row] for row in rows]
        return torch.tensor([[one == other for other in texts] for one in texts])


_LOSSES: Mapping[str, tuple[type[PairLoss], ...]] = {
    "contrastive": (AlignLoss,),
    "distil": (DistilLoss,),
    "both": (AlignLoss, DistilLoss),
}
"""Losses of each objective."""


def alignment_loss(
    base: BaseModel, pairs: Sequence[Pair], settings: AlignSettings | JointSettings, **more: Unpack[PairOptions]
) -> AlignmentLoss:
    """Return the loss of the objective that the settings name; see `PairLoss` for the other arguments."""
    losses = [kind(base, pairs, settings, **more) for kind in _LOSSES[settings.objective]]
    return losses[0] if len(losses) == 1 else BothLosses(*losses)


def negatives(settings: AlignSettings | JointSettings, processes: Processes) -> str:
    """Return a note on how many negatives a pair has."""
    if settings.gather_negatives:
        return f"{settings.batch_size - 1} negatives per pair, of all processes"
    sizes = sorted({len(share) - 1 for share in processes.shares(range(settings.batch_size))})
    return f"{' or '.join(map(str, sizes))} negatives per pair, all of one process (--no-gather-negatives)"


class AlignEntries(DataEntries):
    """The manifest's entries on the pairs of a run and on its objective; merges copy `vectors`: how they are pooled."""

    objective: JsonObject
    vectors: JsonObject


A = TypeVar("A", bound=AlignSettings | JointSettings)


class AlignObjective(Objective[A]):
    """Alignment of pooled states after block L; as the only objective, later blocks are neither run nor adapted."""

    unit = "pairs"
    measure = "dev_accuracy"
    data: PairData
    depth: tuple[int, int]
    """Number of blocks below the loss, and of the whole model."""

    def read(self) -> None:
        self.data = PairData.read(self.run.settings, self.run.watch)
        self.report = self.data.report

    def notes(self) -> list[str]:
        settings, processes = self.run.settings, self.run.processes
        shared = processes.count > 1 and settings.objective != "distil"
        return self.report.warnings("pairs") + ([negatives(settings, processes)] if shared else [])

    def prepare(self) -> None:
        base, whole = self.run.base, isinstance(self.run.settings, JointSettings)
        total = base.layers
        layer = aligned_layer(base.model, self.run.settings, whole=whole)
        self.depth = layer, total
        if not whole:
            keep_blocks(base.model, layer)
            self.layers = layer if layer < total else None

    def rows(self) -> int:
        return len(self.data.pairs)

    def dev(self) -> dict[str, RowsLoss]:
        if not self.data.dev:
            return {}
        return {"dev_loss": self._loss(self.data.dev, like=self.data.pairs).of_rows}

    def entries(self) -> AlignEntries:
        settings, (layer, layers) = self.run.settings, self.depth
        return {
            **self.data.entries(),
            "objective": {
                "name": settings.objective,
                "layer": layer,
                "layers": layers,
                "pairs": len(self.data.pairs),
            },
            "vectors": settings.model_dump(include={"pooling", "exclude_bos", "standardize"}),
        }

    def loss(self, together: Together | None = None) -> AlignmentLoss:
        return self._loss(self.data.pairs, watch=self.run.watch, together=together)

    def _loss(self, pairs: Sequence[Pair], **more: Unpack[PairOptions]) -> AlignmentLoss:
        run = self.run
        options: PairOptions = {"layer": self.depth[0], "processes": run.processes, **more}
        return alignment_loss(run.base, pairs, run.settings, **options)
