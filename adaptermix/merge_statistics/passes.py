"""Passes of a model over rows or texts, with a look at what some of its linear layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..baking.activations import text_batches
from ..merging.attach import MixedRowsError
from ..models.base import BaseModel, backbone, reading
from ..training.early_stopping import RowsLoss


class Passes(Protocol):
    """What a model reads, batch by batch."""

    @property
    def count(self) -> int:
        """Rows in all."""

    def batches(self, size: int) -> Iterator[Any]:
        """Yield batches of rows."""

    def run(self, batch: Any) -> Tensor | None:
        """Let the model read a batch; return minus the log-likelihood of its answers, summed, where rows have some."""

    def rows(self, batch: Any) -> int:
        """Return the number of rows of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Plain texts, which the model only reads.

    Args:
        base: The model.
        texts: The texts.
    """

    base: BaseModel
    texts: Sequence[str]

    @property
    def count(self) -> int:
        """Texts in all."""
        return len(self.texts)

    def batches(self, size: int) -> Iterator[Any]:
        """Yield encoded texts."""
        yield from text_batches(self.base, self.texts, size)

    def run(self, batch: Any) -> None:
        """Read a batch as far as hidden states."""
        backbone(self.base)(**batch, **reading(self.base))

    def rows(self, batch: Any) -> int:
        """Return the number of texts of a batch."""
        return len(batch["input_ids"])


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRows:
    """Rows of a task with their answers.

    Args:
        loss: Their loss, by row numbers.
    """

    loss: RowsLoss

    @property
    def count(self) -> int:
        """Rows with an answer."""
        return len(self.loss.taught)

    def batches(self, size: int) -> Iterator[list[int]]:
        """Yield numbers of rows of like length."""
        order = sorted(self.loss.taught, key=lambda row: -self.loss.lengths[row])
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def run(self, batch: Sequence[int]) -> Tensor:
        """Return minus the sum of the log-likelihoods of the answers."""
        return self.loss(batch).loss * self.loss.terms(batch)

    def rows(self, batch: Sequence[int]) -> int:
        """Return the number of rows of a batch."""
        return len(batch)


@contextmanager
def looking(modules: Mapping[str, Any], look: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `look(name, input, output)` whenever a module has run, until the context ends.

    Hooks of adapters that act on the model must be there already, so that outputs hold what these add.

    Args:
        modules: Linear layers by name.
        look: What to call.
    """

    def hook(name: str) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
        return lambda _module, inputs, output: look(name, inputs[0], output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Mask:
    """The attention mask of the last pass over a model's backbone, None where it was given none."""

    def __init__(self, base: BaseModel) -> None:
        self._module = backbone(base)
        self.last: Tensor | None = None

    def __enter__(self) -> Mask:
        def note(_module: Any, _inputs: Any, named: Mapping[str, Any]) -> None:
            found = named.get("attention_mask")
            self.last = found.bool() if isinstance(found, Tensor) and found.dim() == 2 else None

        self._handle = self._module.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def each_batch(passes: Passes, size: int, advance: Callable[[int, str], None]) -> Iterator[tuple[Any, int]]:
    """Yield batches with their numbers of rows, and report them once they are done."""
    for batch in passes.batches(size):
        rows = passes.rows(batch)
        yield batch, rows
        advance(rows, "")


def alone_if_mixed(measure: Callable[[int], dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """Return what `measure(batch size)` returns, row by row where a module does not see batches row by row.

    Experts, to which tokens are sent, and texts that are read in several windows are such modules and rows.
    """
    if size > 1:
        try:
            return measure(size)
        except MixedRowsError:
            pass
    return measure(1)
