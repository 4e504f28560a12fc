"""Forward passes over rows or texts, with hooks on some linear layers."""

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
    """The model's inputs, batch by batch."""

    @property
    def count(self) -> int:
        """Rows in all."""

    def batches(self, size: int) -> Iterator[Any]:
        """Yield batches of rows."""

    def run(self, batch: Any) -> Tensor | None:
        """Run a batch; return the negative log-likelihood of its answers, summed, if its rows have answers."""

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
        """Run a batch up to its hidden states."""
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
    """Call `look(name, input, output)` after each run of a module, while the context is open.

    Hooks of attached adapters must be installed before, so that outputs include the adapters.

    Args:
        modules: Linear layers by name.
        look: The function to call.
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
    """The attention mask of the last pass over a model's backbone; None if the pass had no mask."""

    def __init__(self, base: BaseModel) -> None:
        self._module = backbone(base)
        self.last: Tensor | None = None

    def __enter__(self) -> Mask:
        def note(_module: Any, _inputs: Any, named: Mapping[str, Any]) -> None:
            mask = named.get("attention_mask")
            self.last = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

        self._handle = self._module.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def each_batch(passes: Passes, size: int, advance: Callable[[int, str], None]) -> Iterator[tuple[Any, int]]:
    """Yield batches with their numbers of rows, and report them after they are processed."""
    for batch in passes.batches(size):
        rows = passes.rows(batch)
        yield batch, rows
        advance(rows, "")


def alone_if_mixed(measure: Callable[[int], dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """Return the result of `measure(batch size)`, with batches of one row if a module mixes rows.

    Experts, which receive single tokens, and texts in several windows mix rows.
    """
    if size > 1:
        try:
            return measure(size)
        except MixedRowsError:
            pass
    return measure(1)
