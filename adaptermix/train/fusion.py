"""`train-fusion`: a task LoRA whose bottleneck fuses each text with its source in another language."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.keys import PREFIX
from ..adapters.writer import write_tensors
from ..files import whole_folder, write_whole
from ..fusion.bank import SourceBank
from ..fusion.rows import encode_sources, read_beside
from ..fusion.sources import Fuser
from ..models import BaseModel
from ..progress import SILENT, Watcher
from ..settings import FusionSettings
from ..splits import DEV, TRAINING, refuse_tested
from .lora import is_head, stored_name
from .parallel import Processes, in_processes
from .run import TrainReport, check_before, dry_report, train
from .selection import DevLosses, DevWatch, RowsLoss
from .task import Answers, TaskData, TaskLoss
from .trainer import BatchLoss, count_steps

_WEIGHTS = "adapter_model.safetensors"


class _Fusing:
    """What fuses on a model; its LoRA comes after the losses are made."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    @cached_property
    def fuser(self) -> Fuser:
        """What stands before the model's passes."""
        return Fuser(self._base.model)


class FusedRows:
    """The loss of rows beside their sources.

    Args:
        rows: The loss of rows by their numbers.
        bank: Their sources.
        fusing: What fuses on the model.
    """

    def __init__(self, rows: RowsLoss, bank: SourceBank, fusing: _Fusing) -> None:
        self._rows, self._bank, self._fusing = rows, bank, fusing
        self.lengths = rows.lengths

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        """Return the loss of these rows and their count of tokens.

        Raises:
            RuntimeError: nothing was fused.
        """
        fuser = self._fusing.fuser
        before = fuser.count
        fuser.use(self._bank.of(rows))
        found = self._rows(rows)
        if fuser.count == before:
            raise RuntimeError("a pass must reach the fused modules, and reached none")
        return found


def train_fusion(settings: FusionSettings, *, watch: Watcher = SILENT) -> TrainReport:
    """Train a LoRA that fuses each text with its source.

    The sources are read by the base model without the LoRA, in evaluation mode.

    Raises:
        AdapterMixError: the model, a data file, a setting or the output does not do.

    Reference: FLARE, section 3.
    """
    return in_processes(_train_fusion, settings, watch)


def _train_fusion(settings: FusionSettings, watch: Watcher, processes: Processes) -> TrainReport:
    check_before(settings)
    data = TaskData.read(settings)
    sources, files = read_beside(data.task, settings.source, data.train, settings.rows, watch)
    dev_sources, dev_files = (
        read_beside(data.task, settings.dev_source, data.dev, None, watch) if data.dev else ([], [])
    )
    refuse_tested({TRAINING: files, DEV: dev_files}, allowed=settings.allow_tested)
    steps = count_steps(len(data.train), settings)
    if settings.dry_run:
        data.head(settings)
        return dry_report(settings, steps, rows=data.report)
    base = data.load(settings, processes)
    fusing = _Fusing(base)

    def beside(rows: Sequence[Any], texts: Sequence[Any]) -> FusedRows:
        loss = data.objective(base, rows, settings.max_length, watch)
        prompts = loss.prompts if isinstance(loss, Answers) else loss.lengths
        encoded = encode_sources(base, data.task, data.template.name, texts, settings.max_length)
        return FusedRows(loss, SourceBank(base, encoded, prompts, settings.peft_settings()), fusing)

    rows = beside(data.train, sources)
    base.model.train()
    watched = None
    if data.dev:
        losses = DevLosses(base, {"dev_loss": beside(data.dev, dev_sources)}, settings, processes)
        watched = DevWatch(losses, settings, steps=steps, rows=len(data.train), key="dev_loss", watch=watch)
    entries = data.manifest(base)
    entries["fusion"] = {"sources": [file.entry() for file in files], **settings.peft_settings()}
    return train(
        base,
        settings,
        lambda: TaskLoss(rows, settings, processes),
        steps=steps,
        kind="train-fusion",
        entries=entries,
        layers=None,
        watch=watch,
        dev=watched,
        processes=processes,
        write=write_fusion,
    )


def write_fusion(
    out: Path,
    config: Any,
    values: Mapping[str, Tensor],
    document: Mapping[str, Any],
    history: bytes,
    *,
    overwrite: bool,
) -> None:
    """Write a fused LoRA as PEFT would, with its scale apart: a fusion is not linear, so the scale cannot lie in A.

    Args:
        out: The folder.
        config: PEFT's config.
        values: What was trained, by parameter name.
        document: The manifest.
        history: The history file.
        overwrite: Replace an existing folder.
    """
    from .. import manifest
    from ..publish.card import card

    tensors = {
        stored_name(name) if is_head(name) else PREFIX + name.replace(".default", "", 1): value.detach().float().cpu()
        for name, value in values.items()
    }
    with whole_folder(out, overwrite=overwrite) as folder:
        write_tensors(folder / _WEIGHTS, tensors, {"format": "pt"})
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        plain |= {"inference_mode": True}
        write_whole(folder / "adapter_config.json", (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode())
        manifest.write(folder, document)
        (folder / "README.md").write_text(card(document, name=out.name), encoding="utf-8")
        write_whole(folder / "history.jsonl", history)
