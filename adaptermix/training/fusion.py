"""`train-fusion`: a task LoRA that sees each text together with its source in another language."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.keys import PREFIX
from ..errors import DataError, PlanError
from ..fusion.bank import SourceBank
from ..fusion.extra_modules import MIXING, add_parts
from ..fusion.latents import Latents, check_encoder
from ..fusion.mixup import MIXUP, Mixer, consistency
from ..fusion.source_rows import INPUT, encode_latents, encode_sources, is_missing, joined, read_beside
from ..fusion.sources import Fuser, fused_modules
from ..io.files import write_whole
from ..io.json_types import JsonObject
from ..io.safetensors_writer import write_tensors
from ..models.base import BaseModel, model_kind
from ..models.blocks import block_index
from ..models.head_forms import Head
from ..models.positions import readable
from ..options import FusionSettings
from ..progress import SILENT, Watcher
from ..tasks.data import DataFile
from ..tasks.data.tables import Row
from ..tasks.heads.base import longest
from ..tasks.splits import DEV, TRAINING, refuse_tested
from .early_stopping import RowsLoss
from .lora import config_of, is_head, stored_name
from .report import TrainReport
from .runner import both, run_training
from .task import Answers, OfHead, TaskData, TaskEntries, TaskObjective
from .trainer import BatchLoss

_WEIGHTS = "adapter_model.safetensors"
_OF_SOURCE = 0.4
"""Weight of the source's own loss in X-Mixup; the target's has the rest."""


@dataclass(kw_only=True)
class _Fusing:
    """A model that will fuse, with its hooks; the LoRA is injected after the losses are made.

    Args:
        base: The model.
        data: Rows of the run.
        settings: The run's settings.
        settings_of: The fusion's settings, by PEFT's names.
        latents: Encoder whose states are the sources, if not the base's own.
        watch: Receives progress.
    """

    base: BaseModel
    data: TaskData
    settings: FusionSettings
    settings_of: Mapping[str, Any]
    latents: Latents | None
    watch: Watcher

    @cached_property
    def fuser(self) -> Fuser:
        """The fuser of the LoRAs.

        Raises:
            PlanError: no LoRA is on a layer that supports fusion.
        """
        if not fused_modules(self.base.model):
            raise PlanError(
                "--targets must hold queries or values, which fuse: leave it out to adapt both.", code="fusion.targets"
            )
        return Fuser(self.base.model)

    @cached_property
    def mixer(self) -> Mixer:
        """What mixes states in one block."""
        return Mixer(self.base, self.settings_of["fusion_layer"], MIXING)

    def rows(self, rows: Sequence[Row], times: int = 1) -> Answers | OfHead:
        """Return the loss of rows, which may be as many times as long as usual, but no longer than a head reads."""
        most = self.settings.max_length
        if times > 1:
            most = (
                max(most, min(times * most, longest(self.base)))
                if self.base.head
                else readable(self.base.model, times * most)
            )
        return self.data.objective(self.base, rows, most, self.watch)


class FusedRows:
    """The loss of rows whose LoRAs fuse them with their sources.

    Args:
        fusing: The model.
        rows: The rows.
        sources: Their sources.
    """

    def __init__(self, fusing: _Fusing, rows: Sequence[Row], sources: Sequence[Row]) -> None:
        settings, base, data = fusing.settings, fusing.base, fusing.data
        self._fusing, self._rows = fusing, fusing.rows(rows)
        self.lengths, self.taught = self._rows.lengths, self._rows.taught
        is_whole = base.head is None and settings.alignment == "row-end"
        prompts = [[length] for length in self.lengths] if is_whole else self._rows.prompts
        if fusing.latents:
            texts = encode_latents(fusing.latents, data.task, sources)
        else:
            texts = encode_sources(base, data.task, data.template.name, sources, settings.max_length)
        self._bank = SourceBank(base, texts, prompts, fusing.settings_of, fusing.latents)

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the loss of these rows and their count of tokens.

        Raises:
            RuntimeError: the pass fused no source.
            ValueError: some sources were not.
        """
        fuser = self._fusing.fuser
        before = fuser.count
        sources = self._bank.of(rows)
        fuser.use(sources)
        batch = self._rows(rows)
        fuser.check()
        if sources and fuser.count == before:
            raise RuntimeError("a pass must reach the fused modules, and reached none")
        return batch

    def terms(self, rows: Sequence[int]) -> int:
        return self._rows.terms(rows)


class MixedRows:
    """Loss of rows and of their sources, mixed in one block; in training also their disagreement.

    Args:
        fusing: A model with a head for classes.
        rows: The rows.
        sources: Their sources.

    Raises:
        PlanError: a source is missing.

    Reference: Yang et al., X-Mixup, ICLR 2022, section 3.3.
    """

    def __init__(self, fusing: _Fusing, rows: Sequence[Row], sources: Sequence[Row]) -> None:
        if any(is_missing(fusing.data.task, source) for source in sources):
            raise PlanError(
                f"--fusion {MIXUP} needs a source for every row: leave the rows without one out.",
                code="fusion.row-without-source",
            )
        self._fusing, self._rows, self._sources = fusing, fusing.rows(rows), fusing.rows(sources)
        self.lengths, self.taught = self._rows.lengths, self._rows.taught

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        mixer = self._fusing.mixer
        mixer.use(None)
        alone = self._sources(rows)
        source = mixer.passed()
        mixer.use(source)
        batch = self._rows(rows)
        mixer.use(None)
        if not self._fusing.base.model.training:
            return batch
        loss = _OF_SOURCE * alone.loss + (1 - _OF_SOURCE) * batch.loss + consistency(source, mixer.passed())
        return batch._replace(loss=loss, tokens=alone.tokens + batch.tokens)

    def terms(self, rows: Sequence[int]) -> int:
        return self._rows.terms(rows)


def _check_head(fusion: str, head: Head | None, kind: str) -> None:
    """Refuse a fusion that a model with such a head cannot have.

    Raises:
        PlanError: it is one.
    """
    if fusion == MIXUP and (head is None or head.form.name != "classes" or kind != "encoder"):
        raise PlanError(
            f"--fusion {MIXUP} is for encoders with a classification head: choose another fusion.",
            code="fusion.no-classes",
        )
    if fusion == "cross-attention-paper" and kind != "encoder":
        raise PlanError(
            f"--fusion {fusion} lets tokens see those to come, so it is for encoders: take cross-attention.",
            code="fusion.encoder-only",
        )


def _joined_rows(fusing: _Fusing, rows: Sequence[Row], sources: Sequence[Row]) -> RowsLoss:
    return fusing.rows(joined(fusing.data.task, rows, sources), times=2)


_LOSSES: Mapping[str, Callable[[_Fusing, Sequence[Row], Sequence[Row]], RowsLoss]] = {
    MIXUP: MixedRows,
    INPUT: _joined_rows,
}
"""Losses of fusions that are not in the bottleneck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """Sources of the rows.

    Args:
        train: Sources of the training rows.
        dev: Sources of the dev rows.
        files: Their files, those of the training rows first.
        entries: The manifest's entries on rows and sources.
    """

    train: Sequence[Row]
    dev: Sequence[Row]
    files: Sequence[DataFile]
    entries: TaskEntries

    @classmethod
    def read(cls, settings: FusionSettings, data: TaskData, watch: Watcher) -> _Sources:
        """Read them; where another encoder reads the rows themselves these are their own sources.

        Raises:
            DataError: there is not a source for each row, or a file is test data.
        """
        if not settings.source:
            return cls(train=data.train, dev=data.dev, files=(), entries=data.entries)
        task = data.task
        train, files = read_beside(
            task, settings.source, data.train, data=settings.train, chosen=settings.rows, watch=watch
        )
        dev, dev_files = (
            read_beside(task, settings.dev_source, data.dev, data=settings.dev, chosen=None, watch=watch)
            if data.dev
            else ([], [])
        )
        if all(is_missing(task, source) for source in train):
            raise DataError(
                "at least one training row must have a source, and all are missing (-).", code="fusion.no-sources"
            )
        tested = refuse_tested({TRAINING: files, DEV: dev_files}, allowed=settings.allow_tested, watch=watch)
        entries = data.entries | {
            "data": [*data.entries["data"], *(file.entry() for file in files)],
            "dev": both(data.entries["dev"], [file.entry() for file in dev_files]),
            "tested": both(data.entries["tested"], tested),
        }
        return cls(train=train, dev=dev, files=files, entries=entries)


def _fusing(base: BaseModel, data: TaskData, settings: FusionSettings, watch: Watcher) -> _Fusing:
    """Add the modules that a fusion trains besides its LoRAs, and load the source encoder if there is one.

    Raises:
        AdapterMixError: there is no such encoder, or no such block.
    """
    latents = None
    if settings.source_encoder:
        load = settings.load_options()
        latents = Latents(settings.source_encoder, device=load["device"], dtype=load["dtype"], tag=settings.source_tag)
    values: dict[str, Any] = {"fusion": settings.fusion} | settings.peft_settings()
    if settings.fusion == MIXUP:
        values["fusion_layer"] = block_index(settings.mixup_layer, base.layers, option="--mixup-layer")
    parts = add_parts(base.model, values, latent=latents.width if latents else 0, seed=settings.seed)
    base = replace(base, head_modules=(*base.head_modules, *parts))
    return _Fusing(base=base, data=data, settings=settings, settings_of=values, latents=latents, watch=watch)


class FusionEntries(TaskEntries):
    """The manifest's entries on the data of a run, on its `task` and on its `fusion`."""

    fusion: JsonObject


class FusionObjective(TaskObjective[FusionSettings]):
    """A task whose LoRA sees each text together with its source in another language."""

    command = "train-fusion"
    sources: _Sources
    fusing: _Fusing

    def read(self) -> None:
        super().read()
        self.sources = _Sources.read(self.run.settings, self.data, self.run.watch)
        self.data = replace(self.data, entries=self.sources.entries)

    def check(self) -> None:
        settings = self.run.settings
        _check_head(settings.fusion, self.data.head(settings), model_kind(settings.base))
        if settings.source_encoder:
            check_encoder(settings.source_encoder)

    def prepare(self) -> None:
        run = self.run
        _check_head(run.settings.fusion, run.base.head, run.base.kind)
        self.fusing = _fusing(run.base, self.data, run.settings, run.watch)
        run.base = self.fusing.base
        make = _LOSSES.get(run.settings.fusion, FusedRows)
        self.train_rows = make(self.fusing, self.data.train, self.sources.train)
        run.base.model.train()
        self.dev_rows = make(self.fusing, self.data.dev, self.sources.dev) if self.data.dev else None

    def entries(self) -> FusionEntries:
        fusing, files = self.fusing, self.sources.files
        encoder = {"encoder_fingerprint": fusing.latents.fingerprint} if fusing.latents else {}
        missing = sum(is_missing(self.data.task, source) for source in self.sources.train)
        without = {"rows_without_source": missing} if missing else {}
        fusion = {"sources": [file.entry() for file in files], **fusing.settings_of, **encoder, **without}
        return {**super().entries(), "fusion": fusion}

    def inputs(self) -> JsonObject:
        return {"encoder": self.fusing.latents and self.fusing.latents.fingerprint}

    def write(self, folder: Path, factors: dict[str, Tensor]) -> None:
        settings, run = self.run.settings, self.run
        # A fusion is not linear, so its scale cannot be a factor of A, and the file keeps PEFT's form.
        if not settings.peft_settings():
            super().write(folder, factors)
            return
        config = config_of(settings, run.base, run.names).to_dict()
        tensors = {
            stored_name(name) if is_head(name) else PREFIX + name.replace(".default", "", 1): value
            for name, value in factors.items()
        }
        plain = {name: value.detach().float().cpu() for name, value in tensors.items()}
        write_tensors(folder / _WEIGHTS, plain, {"format": "pt"})
        known = self.fusing.settings_of  # holds resolved values, such as the number of the middle block
        entries = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        entries |= {"inference_mode": True} | {key: known[key] for key in entries if key in known}
        write_whole(folder / "adapter_config.json", (json.dumps(entries, indent=2, sort_keys=True) + "\n").encode())


def train_fusion(settings: FusionSettings, *, watch: Watcher = SILENT, callbacks: Sequence[object] = ()) -> TrainReport:
    """Train a LoRA that sees each text together with its source.

    The base's states of sources are computed without the LoRA, in evaluation mode.

    Args:
        settings: The run's settings.
        watch: Receives progress.
        callbacks: Objects with methods of transformers' `TrainerCallback`; see `training.callbacks.Callbacks`.

    Raises:
        AdapterMixError: invalid model, data file, setting or output.

    Reference: FLARE, section 3.
    """
    return run_training(FusionObjective, settings, watch=watch, callbacks=callbacks)
