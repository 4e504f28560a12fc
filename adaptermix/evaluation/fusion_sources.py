"""Source texts for evaluating fusion adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import PlanError
from ..fusion.bank import SourceBank
from ..fusion.extra_modules import MIXING
from ..fusion.latents import Latents
from ..fusion.mixup import MIXUP, Mixer
from ..fusion.source_rows import INPUT, encode_latents, encode_sources, is_missing
from ..fusion.sources import Fuser
from ..models.base import BaseModel
from ..options import EvaluateSettings
from ..tasks import Task
from ..tasks.data.tables import Row
from ..tasks.heads import HEADS
from .answering import Answering


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionSource:
    """The fusion inputs that an adapter was trained with.

    Args:
        fusion: Settings of its fusion, by PEFT's names; empty for other adapters.
        task: The task.
        rows: Source of each row, if any; without them a fusion adapter is a plain LoRA.
        template: Name of the prompt template.
        fingerprint: Hash of the weight files of the encoder that it was trained with, if recorded.
    """

    fusion: Mapping[str, Any]
    task: Task
    rows: Sequence[Row] | None
    template: str
    fingerprint: str | None = None


@contextmanager
def fusing(base: BaseModel, answering: Answering, source: FusionSource, settings: EvaluateSettings) -> Iterator[None]:
    """Fuse passes with the sources of their rows while the context is open.

    Args:
        base: The model with the adapter in it.
        answering: The rows to answer.
        source: The adapter's fusion inputs.
        settings: Settings of the evaluation.

    Raises:
        AdapterMixError: the encoder of the sources does not load.
    """
    if source.rows is None or source.fusion["fusion"] == INPUT:
        yield
        return
    way = _mixed if source.fusion["fusion"] == MIXUP else _fused
    before, check, close = way(base, answering, source, source.rows, settings)
    answering.before = before
    try:
        yield
        check()
    finally:
        answering.before = lambda _rows: None
        close()


_Before = tuple[Callable[[Sequence[int]], None], Callable[[], None], Callable[[], None]]
"""Three callbacks: prepare the passes of a batch, check that every source was used, and clean up."""


def _fused(
    base: BaseModel, answering: Answering, source: FusionSource, rows: Sequence[Row], settings: EvaluateSettings
) -> _Before:
    """Fuse inside LoRAs."""
    latents = None
    known = source.fusion.get("fusion_encoder")
    if encoder := known and (settings.source_encoder or known):
        target = settings.load_options()
        tag = source.fusion.get("fusion_tag")
        latents = Latents(encoder, device=target["device"], dtype=target["dtype"], tag=tag)
        if source.fingerprint and latents.fingerprint and source.fingerprint != latents.fingerprint:
            raise PlanError(
                "the source encoder must be the one that the adapter was trained with, and the weight files of "
                f"{encoder!r} differ from it. Give the folder of the right one with --source-encoder.",
                code="fusion.source-encoder",
            )
        texts = encode_latents(latents, source.task, rows)
    else:
        texts = encode_sources(base, source.task, source.template, rows, answering.longest, cut_prompts=False)
    moves = settings.source_alignment and source.fusion["fusion_alignment"] != "soft"
    overrides = {"fusion_alignment": settings.source_alignment} if moves else {}
    bank = SourceBank(base, texts, answering.prompts(), {**source.fusion, **overrides}, latents)
    fuser = Fuser(base.model)

    def before(batch: Sequence[int]) -> None:
        fuser.check()
        fuser.use(bank.of(batch))

    return before, fuser.check, fuser.close


def _mixed(
    base: BaseModel, answering: Answering, source: FusionSource, rows: Sequence[Row], _settings: EvaluateSettings
) -> _Before:
    """Mix passes with those of their sources, which the model with the adapter computes first.

    Raises:
        PlanError: the model has no head.
    """
    if base.head is None:
        raise PlanError(
            f"an adapter of --fusion {MIXUP} has a classification head, and this one has no head.",
            code="fusion.no-classes",
        )
    sources = HEADS[base.head.form.name].encode(base, source.task, rows, max_length=answering.longest)
    there = [not is_missing(source.task, row) for row in rows]
    mixer = Mixer(base, source.fusion["fusion_layer"], MIXING)

    def before(batch: Sequence[int]) -> None:
        mixer.use(None)
        sources.answers(batch)
        passed = mixer.passed()
        numbers = torch.tensor([there[row] for row in batch], device=base.device)
        mixer.use(replace(passed, mask=passed.mask & numbers[:, None]))

    return before, lambda: None, mixer.close
