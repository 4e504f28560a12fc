"""What calibration texts tell of the inputs of a model's modules."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import DataError
from ..io.memory import free_memory
from ..models.base import BaseModel, backbone, reading
from ..models.positions import readable
from ..progress import Watcher
from ..tasks.data import DataFile, find_files, parse_rows
from ..tasks.data.tables import lines_used
from .strategies import Known, Rows

_PARTS = ("fitted", "fitted", "fitted", "chosen", "held")
"""Of five texts three are fitted to, by chance."""
_PARTS_ONCE = tuple(dict.fromkeys(_PARTS))
_LEAST = 20
_LONGEST = 512
_BATCH = 16
_MATRICES = {"fitted": 1, "chosen": 3, "held": 3}
"""Moments that are kept of each part: of rows that count alike, of all rows, and of all but the first tokens."""


@dataclass(slots=True)
class Sums:
    """Running sums over rows of inputs, about a point near their mean, so that large means cost no digits."""

    moment: Tensor
    total: Tensor
    center: Tensor | None = None
    rows: int = 0
    weight: float = 0.0

    @classmethod
    def of(cls, width: int, device: torch.device) -> Self:
        """Return sums over nothing."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows [rows width], each with its weight, or 1."""
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
        """Return what was summed; the sums are used up, since there is memory for one matrix only."""
        weight = self.weight or 1.0
        off = self.total / weight
        mean = off if self.center is None else self.center + off
        return Rows(covariance=self.moment.div_(weight).addr_(off, off, alpha=-1), mean=mean, count=self.rows)


@dataclass(slots=True)
class _Part:
    """Sums over one part of the texts: codes are fitted to `even` alone, so the others are not kept there."""

    even: Sums
    every: Sums | None = None
    rest: Sums | None = None

    @classmethod
    def of(cls, part: str, width: int, device: torch.device) -> Self:
        """Return sums over nothing."""
        return cls(*(Sums.of(width, device) for _ in range(_MATRICES[part])))

    def add(self, rows: Tensor, weights: Tensor, first: Tensor | None) -> None:
        """Add rows; `first` says which are the first token of a text, None where that is not known."""
        self.even.add(rows, weights)
        if self.every is not None:
            self.every.add(rows)
        if self.rest is not None and first is not None:
            self.rest.add(rows[~first])

    def read(self) -> Rows:
        """Return what was summed, of all rows where that was, with the other two ways to count them."""
        even = self.even.read()
        if self.every is None or self.rest is None:
            return even
        rest = self.rest.read()
        return replace(self.every.read(), rest=rest if rest.count else None, even=even)


@dataclass(slots=True)
class _Pass:
    """What hooks of one pass over the texts fill."""

    sums: dict[str, dict[str, _Part]]
    usual: dict[str, float] = field(default_factory=dict)
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))
    part: str = "fitted"

    def take(self, name: str, given: Tensor) -> None:
        rows, first = given.reshape(-1, given.shape[-1]), None
        if len(rows) == self.mask.numel():  # some models lay all tokens one after another
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


def texts_of(arguments: Sequence[str], *, rows: str | None = None) -> tuple[list[str], list[DataFile]]:
    """Return the texts of files, each once, and the files.

    Lines, first columns of TSV, and of JSONL `text`, or all strings of a row.

    Args:
        arguments: `FILE` arguments.
        rows: `START:STOP[:STEP]` of the texts of each file.

    Raises:
        DataError: a file is missing, or is JSONL under another name.
    """
    texts: list[str] = []
    files = []
    for file in find_files(arguments):
        found: list[str] = []
        if ".jsonl" in file.suffixes:
            for _, row in file.json_rows():
                text = row.get("text")
                strings = [text] if isinstance(text, str) else [v for v in row.values() if isinstance(v, str)]
                found.append(" ".join(strings))
        else:
            found = [line.partition("\t")[0].strip() for _, line in file.lines()]
            if found and found[0].startswith("{"):
                raise DataError(
                    f"{file.path} must be named .jsonl for its JSON to be read, and holds '{found[0][:40]}'."
                )
        chosen = list(filter(None, found[parse_rows(rows)]))
        texts += chosen
        files.append(lines_used(file, chosen, rows))
    return list(dict.fromkeys(texts)), files


def read_texts(arguments: Sequence[str]) -> tuple[list[str], list[DataFile]]:
    """Return the texts of calibration files, each once, and the files; see `texts_of`.

    Raises:
        DataError: there are too few texts, or one of the parts that they are split into is empty.
    """
    found, files = texts_of(arguments)
    if len(found) < _LEAST:
        raise DataError(
            f"--calibration must hold at least {_LEAST} texts that differ (lines, `text` of JSONL, first columns of "
            f"TSV), and holds {len(found)}. Give some hundred, as the model will see."
        )
    if not all(split(found).values()):
        raise DataError(
            f"--calibration must hold texts for three parts (to fit to, to choose on, to measure on), into which each "
            f"text falls by chance, and its {len(found)} texts leave one part empty. Give more texts, some hundred."
        )
    return found, files


def split(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of each part; which one a text is in follows from the text alone.

    Example:
        >>> {part: len(found) for part, found in split([str(n) for n in range(100)]).items()}
        {'fitted': 61, 'chosen': 25, 'held': 14}
    """
    found: dict[str, list[str]] = {part: [] for part in _PARTS_ONCE}
    for text in texts:
        draw = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        found[_PARTS[draw % len(_PARTS)]].append(text)
    return found


class InputsOfModules:
    """What texts tell of the inputs of modules, with whatever acts on the model, measured when it is asked for.

    Moments of as many modules as fit the memory are measured in one pass over the texts, in the order given, and
    forgotten when a later one is asked for. Modules that read the same tensor share theirs.
    """

    def __init__(self, base: BaseModel, texts: Sequence[str], modules: Mapping[str, str], watch: Watcher) -> None:
        """Find which modules read the same.

        Args:
            base: The model.
            texts: Calibration texts.
            modules: Paths of linear layers in the model, by the name to ask for, in the order of asking.
            watch: Receives progress.
        """
        self._base, self._texts, self._watch = base, split(texts), watch
        found: dict[str, Any] = dict(base.model.named_modules())
        self._modules = {name: found[path] for name, path in modules.items()}
        self._first, self._turns = read_same(base, min(texts, key=len), self._modules)
        self._known: dict[str, Known] = {}

    def of(self, name: str) -> Known | None:
        """Return what is known of a module's inputs; None for one that was not announced."""
        first = self._first.get(name)
        if first is None:
            return None
        if first not in self._known:
            self._known = {}  # before the next ones take the memory
            self._known = self._measure(self._group(name))
        return self._known[first]

    def _group(self, name: str) -> list[str]:
        """Return the modules to measure together, from this one on."""
        free, size = memory_for_moments(self._base.device), 0
        found: list[str] = []
        names = list(self._modules)
        for other in names[names.index(name) :]:
            first = self._first[other]
            if first in found:
                continue
            size += sum(_MATRICES.values()) * 4 * width_of(self._modules[first]) ** 2
            if found and size > free:
                break
            found.append(first)
        return found

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
        # where some may have turns that are not foreseen the model reads to its end
        is_foreseen = all(len(self._turns[name]) == 1 for name in names)
        last = max(names, key=lambda name: self._turns[name]) if is_foreseen else None
        handles = [
            module.register_forward_pre_hook(partial(_take, running, name, name == last))
            for name, module in modules.items()
        ]
        try:
            with self._watch.track("calibrate", sum(map(len, self._texts.values()))) as advance:
                for running.part, own in self._texts.items():
                    for batch in text_batches(base, own):
                        running.mask = batch["attention_mask"].bool()
                        _read(base, batch)
                        advance(len(running.mask), "")
        finally:
            for handle in handles:
                handle.remove()
        return {name: Known(**{part: running.sums[part][name].read() for part in _PARTS_ONCE}) for name in names}


class _EnoughError(Exception):
    """The model has read as far as it must."""


def _take(running: _Pass, name: str, is_last: bool, _module: Any, given: Sequence[Any]) -> None:
    running.take(name, given[0])
    if is_last:
        raise _EnoughError


def _read(base: BaseModel, batch: Mapping[str, Any]) -> None:
    with suppress(_EnoughError):
        backbone(base)(**batch, **reading(base))


@torch.inference_mode()
def read_same(base: BaseModel, text: str, modules: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Return, by module, the first one that reads the same tensors, and its turns."""
    read: dict[str, list[Any]] = {name: [] for name in modules}
    turns: dict[str, list[int]] = {name: [] for name in modules}
    count = itertools.count()

    def note(name: str, _module: Any, given: Sequence[Any]) -> None:
        read[name].append(given[0])  # held, so that no other tensor takes its place
        turns[name].append(next(count))

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    try:
        most = readable(base, _LONGEST)
        _read(base, base.tokenizer([text], truncation=True, max_length=most, return_tensors="pt").to(base.device))
    finally:
        for handle in handles:
            handle.remove()
    firsts: dict[tuple[int, ...], str] = {}
    found = {}
    for name, tensors in read.items():
        found[name] = firsts.setdefault(tuple(map(id, tensors)), name) if tensors else name
    return found, turns


def width_of(module: Any) -> int:
    """Return the number of inputs of a linear layer, or of GPT-2's, whose weight is [in out]."""
    return int(module.in_features if hasattr(module, "in_features") else module.weight.shape[0])


def memory_for_moments(device: torch.device) -> int:
    """Return the bytes that moments may take."""
    return free_memory(device) // (2 if device.type == "cuda" else 3)


def text_batches(base: BaseModel, texts: Sequence[str], size: int = _BATCH) -> Iterator[Any]:
    """Yield batches of encoded texts, padded on the right; texts of like length together, so that little is padding.

    The longest come first, since they show best how large a token usually is.
    """
    order = sorted(texts, key=len, reverse=True)
    for start in range(0, len(order), size):
        yield base.tokenizer(
            order[start : start + size],
            padding=True,
            truncation=True,
            max_length=readable(base, _LONGEST),
            return_tensors="pt",
            padding_side="right",  # as positions are counted from the left
        ).to(base.device)
