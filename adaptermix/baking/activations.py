"""Statistics of the inputs of a model's modules, measured on calibration texts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..io.memory import free_memory
from ..models.base import BaseModel, backbone, reading
from ..models.positions import readable
from ..progress import Watcher
from ..tasks.data import DataFile
from ..tasks.data.texts import texts_of
from .strategies import Known, Rows

if TYPE_CHECKING:
    from transformers import BatchEncoding

_PARTS = ("fitted", "fitted", "fitted", "chosen", "measured")
"""Parts of the texts, chosen by hash: three fifths for fitting."""
_PARTS_ONCE = tuple(dict.fromkeys(_PARTS))
_LEAST = 20
_LONGEST = 512
_BATCH = 16
_MATRICES = {"fitted": 1, "chosen": 3, "measured": 3}
"""Number of second moments per part: over rows with equal weights, over all rows, and without the first tokens."""


@dataclass(slots=True)
class Sums:
    """Running sums over rows of inputs, about a point near their mean, so that large means do not cost precision."""

    moment: Tensor
    total: Tensor
    center: Tensor | None = None
    rows: int = 0
    weight: float = 0.0

    @classmethod
    def of(cls, width: int, device: torch.device) -> Self:
        """Return empty sums."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows [rows width] with their weights, or with weight 1."""
        if not len(rows):
            return
        if self.center is None:
            self.center = rows.mean(0) if weights is None else weights @ rows / weights.sum()
        rows = rows - self.center
        weighted = rows if weights is None else rows * weights[:, None]
        self.moment.addmm_(weighted.T, rows)
        self.total += weighted.sum(0)
        self.rows += len(rows)
        self.weight += len(rows) if weights is None else float(weights.sum(dtype=torch.float64))

    def read(self) -> Rows:
        """Return the statistics. This consumes the sums, since there is memory for one matrix only."""
        weight = self.weight or 1.0
        off = self.total / weight
        mean = off if self.center is None else self.center + off
        return Rows(covariance=self.moment.div_(weight).addr_(off, off, alpha=-1), mean=mean, count=self.rows)


@dataclass(slots=True)
class _Part:
    """Sums over one part of the texts. For the part that codes are fitted to, only `even` is needed."""

    even: Sums
    every: Sums | None = None
    rest: Sums | None = None

    @classmethod
    def of(cls, part: str, width: int, device: torch.device) -> Self:
        """Return empty sums."""
        return cls(*(Sums.of(width, device) for _ in range(_MATRICES[part])))

    def add(self, rows: Tensor, weights: Tensor, first: Tensor | None) -> None:
        """Add rows; `first` marks the first token of each text, None if unknown."""
        self.even.add(rows, weights)
        if self.every is not None:
            self.every.add(rows)
        if self.rest is not None and first is not None:
            self.rest.add(rows[~first])

    def read(self) -> Rows:
        """Return the statistics over all rows if they were summed, with the two other weightings."""
        even = self.even.read()
        if self.every is None or self.rest is None:
            return even
        rest = self.rest.read()
        return replace(self.every.read(), rest=rest if rest.count else None, even=even)


@dataclass(slots=True)
class _Pass:
    """State that the hooks of one pass over the texts fill."""

    sums: dict[str, dict[str, _Part]]
    usual: dict[str, float] = field(default_factory=dict)
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))
    part: str = "fitted"

    def take(self, name: str, inputs: Tensor) -> None:
        rows, first = inputs.reshape(-1, inputs.shape[-1]), None
        if len(rows) == self.mask.numel():  # some models flatten the tokens of all texts
            is_first = torch.zeros_like(self.mask)
            is_first[:, 0] = True  # texts are padded on the right
            rows, first = rows[self.mask.reshape(-1)], is_first[self.mask]
        if not len(rows):
            return
        rows = rows.float()
        sizes = rows.square().sum(1)
        if name not in self.usual and sizes.any():
            self.usual[name] = float(sizes[sizes > 0].median())
        usual = self.usual.get(name, 0.0)
        weights = torch.where(sizes > usual, usual / sizes, torch.ones_like(sizes))
        self.sums[self.part][name].add(rows, weights, first)


def read_texts(arguments: Sequence[str]) -> tuple[list[str], list[DataFile]]:
    """Return the texts of calibration files, without duplicates, and the files; see `texts_of`.

    Raises:
        DataError: there are too few texts, or one of the parts that they are split into is empty.
    """
    texts, files = texts_of(arguments)
    if len(texts) < _LEAST:
        raise DataError(
            f"--calibration must contain at least {_LEAST} different texts (lines, `text` of JSONL, first columns of "
            f"TSV), and contains {len(texts)}. Give a few hundred, similar to the model's later inputs.",
            code="calibration.too-few",
        )
    if not all(split(texts).values()):
        raise DataError(
            "--calibration must contain texts for three parts (fitting, selection, measurement), into which texts are "
            f"split by their hash, and its {len(texts)} texts leave one part empty. Give more texts, a few hundred.",
            code="calibration.empty-part",
        )
    return texts, files


def split(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of each part; a text's part depends only on the text.

    Example:
        >>> {part: len(texts) for part, texts in split([str(n) for n in range(100)]).items()}
        {'fitted': 61, 'chosen': 25, 'measured': 14}
    """
    parts: dict[str, list[str]] = {part: [] for part in _PARTS_ONCE}
    for text in texts:
        draw = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        parts[_PARTS[draw % len(_PARTS)]].append(text)
    return parts


class InputsOfModules:
    """Input statistics of modules on some texts, with the adapters that are attached, measured on demand.

    One pass over the texts measures as many modules as fit the memory, in the order of `modules`, and they are dropped
    when a later module is requested. Modules that read the same tensor share their statistics.
    """

    def __init__(self, base: BaseModel, texts: Sequence[str], modules: Mapping[str, str], watch: Watcher) -> None:
        """Determine which modules read the same tensors.

        Args:
            base: The model.
            texts: Calibration texts.
            modules: Paths of linear layers in the model by name, in the order of later requests.
            watch: Receives progress.
        """
        self._base, self._texts, self._watch = base, split(texts), watch
        by_path: dict[str, nn.Module] = dict(base.model.named_modules())
        self._modules = {name: by_path[path] for name, path in modules.items()}
        self._first, self._turns = read_same(base, min(texts, key=len), self._modules)
        self._known: dict[str, Known] = {}

    def of(self, name: str) -> Known | None:
        """Return the statistics of a module's inputs; None for a module that is not in `modules`."""
        first = self._first.get(name)
        if first is None:
            return None
        if first not in self._known:
            self._known = {}  # free the memory before the next ones are measured
            self._known = self._measure(self._group(name))
        return self._known[first]

    def _group(self, name: str) -> list[str]:
        """Return the modules to measure together, starting with this one."""
        free, size = memory_for_moments(self._base.device), 0
        group: list[str] = []
        names = list(self._modules)
        for other in names[names.index(name) :]:
            first = self._first[other]
            if first in group:
                continue
            size += sum(_MATRICES.values()) * 4 * width_of(self._modules[first]) ** 2
            if group and size > free:
                break
            group.append(first)
        return group

    @torch.inference_mode()
    def _measure(self, names: Sequence[str]) -> dict[str, Known]:
        base = self._base

        modules = {name: self._modules[name] for name in names}
        running = _Pass(
            sums={
                part: {name: _Part.of(part, width_of(module), base.device) for name, module in modules.items()}
                for part in _PARTS_ONCE
            }
        )
        # Where the order of modules may differ between texts, the model reads to its end.
        is_foreseen = all(len(self._turns[name]) == 1 for name in names)
        last = max(names, key=lambda name: self._turns[name]) if is_foreseen else None
        handles = [
            module.register_forward_pre_hook(partial(_take, running, name, name == last))
            for name, module in modules.items()
        ]
        try:
            with self._watch.track("calibrate", sum(map(len, self._texts.values()))) as advance:
                for running.part, texts in self._texts.items():
                    for batch in text_batches(base, texts):
                        running.mask = batch["attention_mask"].bool()
                        _read(base, batch)
                        advance(len(running.mask), "")
        finally:
            for handle in handles:
                handle.remove()
        return {name: Known(**{part: running.sums[part][name].read() for part in _PARTS_ONCE}) for name in names}


class _EnoughError(Exception):
    """Raised to stop the forward pass once all requested modules have run."""


def _take(running: _Pass, name: str, is_last: bool, _module: nn.Module, inputs: Sequence[Tensor]) -> None:
    running.take(name, inputs[0])
    if is_last:
        raise _EnoughError


def _read(base: BaseModel, batch: BatchEncoding) -> None:
    with suppress(_EnoughError):
        backbone(base)(**batch, **reading(base))


@torch.inference_mode()
def read_same(
    base: BaseModel, text: str, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Return, by module, the first module that reads the same tensors, and the positions of its calls."""
    read: dict[str, list[Tensor]] = {name: [] for name in modules}
    turns: dict[str, list[int]] = {name: [] for name in modules}
    count = itertools.count()

    def note(name: str, _module: nn.Module, inputs: Sequence[Tensor]) -> None:
        read[name].append(inputs[0])  # kept, so that its memory is not reused for another tensor
        turns[name].append(next(count))

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    try:
        most = readable(base.model, _LONGEST)
        _read(base, base.tokenizer([text], truncation=True, max_length=most, return_tensors="pt").to(base.device))
    finally:
        for handle in handles:
            handle.remove()
    firsts: dict[tuple[int, ...], str] = {}
    calls = {}
    for name, tensors in read.items():
        calls[name] = firsts.setdefault(tuple(map(id, tensors)), name) if tensors else name
    return calls, turns


def width_of(module: nn.Module) -> int:
    """Return the number of inputs of a linear layer, or of GPT-2's, whose weight is [in out]."""
    return int(getattr(module, "in_features", 0)) or module.get_parameter("weight").shape[0]


def memory_for_moments(device: torch.device) -> int:
    """Return the bytes available for second moments."""
    return free_memory(device) // (2 if device.type == "cuda" else 3)


def text_batches(base: BaseModel, texts: Sequence[str], size: int = _BATCH) -> Iterator[BatchEncoding]:
    """Yield batches of encoded texts, padded on the right; texts of similar length are batched to save padding.

    The longest texts are first, since they give the best estimate of the usual size of a token.
    """
    order = sorted(texts, key=len, reverse=True)
    for start in range(0, len(order), size):
        yield base.tokenizer(
            order[start : start + size],
            padding=True,
            truncation=True,
            max_length=readable(base.model, _LONGEST),
            return_tensors="pt",
            padding_side="right",  # since positions are counted from the left
        ).to(base.device)
