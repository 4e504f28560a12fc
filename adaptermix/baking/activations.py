"""Second moments of the inputs of a model's modules on calibration texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import find_files
from ..errors import DataError
from ..models import BaseModel, backbone
from ..progress import Watcher
from .strategies import Known

_HELD = 5
"""Every so manieth text has no part in fitting, and measures it."""
_LONGEST = 512
_BATCH = 16
_BYTES = 4 * 2**30
"""Memory that moments may take at a time; texts are read again for further modules."""


@dataclass(slots=True)
class _Sums:
    """Running sums over rows of inputs."""

    moment: Tensor
    total: Tensor
    rows: int = 0

    def add(self, rows: Tensor) -> None:
        self.moment.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.rows += len(rows)

    def means(self) -> tuple[Tensor, Tensor]:
        return self.moment / max(1, self.rows), self.total / max(1, self.rows)


@dataclass(slots=True)
class _Pass:
    """What hooks of one pass over the texts fill."""

    fitted: dict[str, _Sums]
    held: dict[str, _Sums]
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))
    is_held: bool = False

    def take(self, name: str, given: Tensor) -> None:
        rows = given[self.mask] if given.shape[:-1] == self.mask.shape else given.reshape(-1, given.shape[-1])
        (self.held if self.is_held else self.fitted)[name].add(rows.float())


def read_texts(files: Sequence[str]) -> list[str]:
    """Return the texts of calibration files: lines, fields `text` of JSONL, first columns of TSV.

    Raises:
        DataError: there are fewer than two texts.
    """
    texts: list[str] = []
    for file in find_files(files):
        if ".jsonl" in file.suffixes:
            rows = (row for _, row in file.json_rows())
            texts += [
                str(row.get("text") or " ".join(str(v) for v in row.values() if isinstance(v, str))) for row in rows
            ]
        else:
            texts += [line.partition("\t")[0].strip() for _, line in file.lines()]
    found = [text for text in texts if text]
    if len(found) < 2 * _HELD:
        raise DataError(
            f"--calibration must hold at least {2 * _HELD} texts, and holds {len(found)}. Give some hundred, as the "
            "model will see."
        )
    return found


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield modules whose moments fit the memory together."""
    group: list[str] = []
    size = 0
    for name, width in widths.items():
        each = 2 * 4 * width * width
        if group and size + each > _BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += each
    if group:
        yield group


def known_inputs(
    base: BaseModel, texts: Sequence[str], modules: Mapping[str, str], watch: Watcher
) -> Iterator[tuple[str, Known]]:
    """Yield what texts tell of the inputs of modules, with whatever acts on the model.

    Args:
        base: The model.
        texts: Calibration texts; every fifth is held out.
        modules: Paths in the model, by the name to yield.
        watch: Receives progress.
    """
    found: dict[str, Any] = dict(base.model.named_modules())
    widths = {name: int(found[path].in_features) for name, path in modules.items()}
    for group in _groups(widths):
        yield from _measured(base, texts, {name: found[modules[name]] for name in group}, watch)


@torch.inference_mode()
def _measured(
    base: BaseModel, texts: Sequence[str], modules: Mapping[str, Any], watch: Watcher
) -> Iterator[tuple[str, Known]]:
    def empty() -> dict[str, _Sums]:
        widths = {name: int(module.in_features) for name, module in modules.items()}
        return {
            name: _Sums(torch.zeros(n, n, device=base.device), torch.zeros(n, device=base.device))
            for name, n in widths.items()
        }

    running = _Pass(fitted=empty(), held=empty())
    handles = [
        module.register_forward_pre_hook(lambda _module, given, name=name: running.take(name, given[0]))
        for name, module in modules.items()
    ]
    body = backbone(base)
    extra = {"use_cache": False} if base.kind == "causal" else {}
    try:
        with watch.track("calibrate", len(texts)) as advance:
            for is_held in (False, True):
                part = [text for place, text in enumerate(texts) if (place % _HELD == _HELD - 1) == is_held]
                running.is_held = is_held
                for start in range(0, len(part), _BATCH):
                    batch = base.tokenizer(
                        part[start : start + _BATCH],
                        padding=True,
                        truncation=True,
                        max_length=_LONGEST,
                        return_tensors="pt",
                    ).to(base.device)
                    running.mask = batch["attention_mask"].bool()
                    body(**batch, **extra)
                    advance(len(part[start : start + _BATCH]), "")
    finally:
        for handle in handles:
            handle.remove()
    for name in modules:
        (moment, mean), (held_moment, held_mean) = running.fitted[name].means(), running.held[name].means()
        yield name, Known(moment=moment, mean=mean, held_moment=held_moment, held_mean=held_mean)
