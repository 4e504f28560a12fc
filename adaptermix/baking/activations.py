"""What calibration texts tell of the inputs of a model's modules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import DataFile, find_files
from ..errors import DataError
from ..models import BaseModel, backbone
from ..progress import Watcher
from .strategies import Known, Rows

_PARTS = ("fitted", "fitted", "fitted", "chosen", "held")
"""Of five texts three are fitted to, by chance."""
_LEAST = 20
_LONGEST = 512
_BATCH = 16
_BYTES = 4 * 2**30
"""Memory that moments may take at a time; texts are read again for further modules."""


@dataclass(slots=True)
class _Sums:
    """Running sums over rows of inputs, about a point near their mean, so that large means cost no digits."""

    moment: Tensor
    total: Tensor
    center: Tensor | None = None
    rows: int = 0

    def add(self, rows: Tensor) -> None:
        if self.center is None:
            self.center = rows.mean(0)
        rows = rows - self.center
        self.moment.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.rows += len(rows)

    def read(self) -> Rows:
        count = max(1, self.rows)
        off = self.total / count
        mean = off if self.center is None else self.center + off
        return Rows(spread=self.moment / count - torch.outer(off, off), mean=mean, count=self.rows)


@dataclass(slots=True)
class _Pass:
    """What hooks of one pass over the texts fill."""

    sums: dict[str, dict[str, _Sums]]
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))
    part: str = "fitted"

    def take(self, name: str, given: Tensor) -> None:
        rows = given[self.mask] if given.shape[:-1] == self.mask.shape else given.reshape(-1, given.shape[-1])
        if len(rows):
            self.sums[self.part][name].add(rows.float())


def read_texts(arguments: Sequence[str]) -> tuple[list[str], list[DataFile]]:
    """Return the texts of calibration files, each once, and the files: lines, `text` of JSONL, first columns of TSV.

    Raises:
        DataError: there are too few texts.
    """
    texts: list[str] = []
    files = find_files(arguments)
    for file in files:
        if ".jsonl" in file.suffixes:
            for _, row in file.json_rows():
                texts.append(
                    str(row.get("text") or " ".join(value for value in row.values() if isinstance(value, str)))
                )
        else:
            texts += [line.partition("\t")[0].strip() for _, line in file.lines()]
    found = list(dict.fromkeys(text for text in texts if text))
    if len(found) < _LEAST:
        raise DataError(
            f"--calibration must hold at least {_LEAST} texts that differ, and holds {len(found)}. Give some hundred, "
            "as the model will see."
        )
    return found, files


def split(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of each part; which one a text is in follows from the text alone.

    Example:
        >>> {part: len(found) for part, found in split([str(n) for n in range(100)]).items()}
        {'fitted': 61, 'chosen': 25, 'held': 14}
    """
    found: dict[str, list[str]] = {"fitted": [], "chosen": [], "held": []}
    for text in texts:
        draw = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        found[_PARTS[draw % len(_PARTS)]].append(text)
    return found


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield modules whose moments fit the memory together."""
    group: list[str] = []
    size = 0
    for name, width in widths.items():
        each = 3 * 4 * width * width
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
        texts: Calibration texts.
        modules: Paths of linear layers in the model, by the name to yield.
        watch: Receives progress.
    """
    found: dict[str, Any] = dict(base.model.named_modules())
    widths = {name: int(found[path].in_features) for name, path in modules.items()}
    for group in _groups(widths):
        yield from _measured(base, split(texts), {name: found[modules[name]] for name in group}, watch)


@torch.inference_mode()
def _measured(
    base: BaseModel, texts: Mapping[str, Sequence[str]], modules: Mapping[str, Any], watch: Watcher
) -> Iterator[tuple[str, Known]]:
    def empty(width: int) -> _Sums:
        return _Sums(torch.zeros(width, width, device=base.device), torch.zeros(width, device=base.device))

    running = _Pass(
        sums={part: {name: empty(int(module.in_features)) for name, module in modules.items()} for part in texts}
    )
    handles = [
        module.register_forward_pre_hook(lambda _module, given, name=name: running.take(name, given[0]))
        for name, module in modules.items()
    ]
    try:
        with watch.track("calibrate", sum(map(len, texts.values()))) as advance:
            for running.part, own in texts.items():
                for batch in _batches(base, own):
                    running.mask = batch["attention_mask"].bool()
                    backbone(base)(**batch, **({"use_cache": False} if base.kind == "causal" else {}))
                    advance(len(running.mask), "")
    finally:
        for handle in handles:
            handle.remove()
    for name in modules:
        yield name, Known(**{part: running.sums[part][name].read() for part in texts})


def _batches(base: BaseModel, texts: Sequence[str]) -> Iterator[Any]:
    """Yield texts of like length together, so that little is padding."""
    order = sorted(texts, key=len)
    for start in range(0, len(order), _BATCH):
        yield base.tokenizer(
            order[start : start + _BATCH], padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
        ).to(base.device)
