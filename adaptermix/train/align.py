"""`train-align`: a stand-alone alignment LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Pair, read_pairs
from ..models import BaseModel, backbone, block_index, blocks, keep_blocks, load_base
from ..pooling import masked_mean
from ..progress import SILENT, Watcher
from ..settings import AlignSettings
from .objectives import contrastive_loss
from .run import TrainReport, check_before, dry_report, train
from .sampler import Sampler
from .trainer import count_steps

CHUNKS = 4


class MiddleStates:
    """The residual stream after the last kept block, before any final norm: HF's `hidden_states[L]` for L < n.

    Args:
        base: A base model whose blocks after L were removed.
        exclude_bos: Leave the first token out of the mean where the tokenizer puts a special one there.
    """

    def __init__(self, base: BaseModel, *, exclude_bos: bool = False) -> None:
        self._body = backbone(base)
        self._tokenizer = base.tokenizer
        self._device = base.device
        self._extra: dict[str, Any] = {"use_cache": False} if base.kind == "causal" else {}
        self._skipped = set(base.tokenizer.all_special_ids) if exclude_bos else set()
        self._caught: list[Tensor] = []
        _, stack = blocks(base.model)
        stack[-1].register_forward_hook(self._catch)

    def _catch(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._caught = [output if isinstance(output, Tensor) else output[0]]

    def _pool(self, encoded: Sequence[list[int]]) -> Tensor:
        batch = self._tokenizer.pad({"input_ids": list(encoded)}, padding_side="right", return_tensors="pt").to(
            self._device
        )
        self._body(**batch, **self._extra)
        mask = batch["attention_mask"]
        if self._skipped:
            mask = mask.clone()
            mask[[row for row, ids in enumerate(encoded) if ids[0] in self._skipped], 0] = 0
        return masked_mean(self._caught.pop(), mask)

    def pooled(self, encoded: Sequence[list[int]]) -> Tensor:
        """Return one mean-pooled vector per token list, in float32.

        Rows of like length are run together, since padding is wasted work; the vectors do not depend on it.

        Shapes: [rows width].
        """
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        size = -(-len(order) // CHUNKS)
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        vectors = torch.cat([self._pool([encoded[row] for row in chunk]) for chunk in chunks])
        back = torch.tensor(order, device=vectors.device).argsort()
        return vectors[back]


def _groups(pairs: Sequence[Pair], balance: str) -> list[list[int]]:
    if balance == "rows":
        return [list(range(len(pairs)))]
    groups: dict[tuple[str, str], list[int]] = {}
    for row, pair in enumerate(pairs):
        groups.setdefault(pair.languages, []).append(row)
    return list(groups.values())


class AlignLoss:
    """Loss of a batch of pairs, by batch number.

    Args:
        base: The base model cut at block L, with its LoRA in.
        pairs: The pairs.
        settings: The run's settings.
    """

    def __init__(self, base: BaseModel, pairs: Sequence[Pair], settings: AlignSettings) -> None:
        self._settings = settings
        self._states = MiddleStates(base, exclude_bos=settings.exclude_bos)
        self._targets = [pair.target for pair in pairs]
        sides = [[pair.source for pair in pairs], self._targets]
        cut = {"truncation": True, "max_length": settings.max_length}
        self._ids = [base.tokenizer(side, **cut)["input_ids"] for side in sides]
        groups = _groups(pairs, settings.balance)
        self._sampler = Sampler(groups=groups, batch_size=settings.batch_size, seed=settings.seed)
        base.model.train()

    def __call__(self, number: int) -> tuple[Tensor, int]:
        """Return the loss of batch `number` and its count of tokens."""
        # a row drawn twice would be its own negative
        rows = list(dict.fromkeys(self._sampler.batch(number)))
        encoded = [side[row] for side in self._ids for row in rows]
        vectors = self._states.pooled(encoded)
        loss = contrastive_loss(
            vectors[: len(rows)],
            vectors[len(rows) :],
            temperature=self._settings.temperature,
            symmetric=self._settings.symmetric,
            same=self._same(rows).to(vectors.device) if self._settings.mask_duplicates else None,
        )
        return loss, sum(map(len, encoded))

    def _same(self, rows: Sequence[int]) -> Tensor:
        texts = [self._targets[row] for row in rows]
        return torch.tensor([[one == other for other in texts] for one in texts])


def train_align(settings: AlignSettings, *, watch: Watcher = SILENT) -> TrainReport:
    """Train an alignment LoRA on parallel pairs.

    The contrastive loss acts on mean-pooled states after block L; later blocks and the output layer are neither
    computed nor adapted, so the LoRA has no weights there.

    Raises:
        AdapterMixError: the model, a data file, a setting or the output does not do.
    """
    check_before(settings)
    pairs, files = read_pairs(settings.pairs, rows=settings.rows)
    steps = count_steps(len(pairs), settings)
    if settings.dry_run:
        return dry_report(settings, steps)
    base = load_base(settings.base, device=settings.device, dtype=settings.dtype)
    total = base.layers
    layer = block_index(settings.layer, total)
    keep_blocks(base.model, layer)
    languages = sorted({language for pair in pairs for language in pair.languages})
    return train(
        base,
        settings,
        lambda: AlignLoss(base, pairs, settings),
        steps=steps,
        kind="train-align",
        entries={
            "languages": {"aligned": languages},
            "data": [file.entry() for file in files],
            "objective": {"name": "contrastive", "layer": layer, "layers": total, "pairs": len(pairs)},
        },
        layers=layer if layer < total else None,
        watch=watch,
        unit="pairs",
    )
