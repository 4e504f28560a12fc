"""Forward passes over rows or texts, with hooks on some linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from ..baking.activations import text_batches
from ..merging.attach import MixedRowsError
from ..models.base import BaseModel, backbone, reading
from ..training.early_stopping import RowsLoss

if TYPE_CHECKING:
    from transformers import BatchEncoding


Batch = tuple[int, Callable[[], Tensor | None]]
"""The number of rows of a batch, and a function that runs them.

It returns the negative log-likelihood of their answers, summed, if the rows have answers.
"""


class Passes(Protocol):
    """The model's inputs, batch by batch."""

    @property
    def count(self) -> int:
        """Rows in all."""

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield batches of at most `size` rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Plain texts without answers; the model computes only their hidden states."""

    base: BaseModel
    texts: Sequence[str]

    @property
    def count(self) -> int:
        return len(self.texts)

    def batches(self, size: int) -> Iterator[Batch]:
        for batch in text_batches(self.base, self.texts, size):
            yield len(batch["input_ids"]), partial(self._run, batch)

    def _run(self, batch: BatchEncoding) -> None:
        """Run a batch up to its hidden states."""
        backbone(self.base)(**batch, **reading(self.base))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRows:
    """Rows of a task with their answers; `loss` takes their indices."""

    loss: RowsLoss

    @property
    def count(self) -> int:
        return len(self.loss.taught)

    def batches(self, size: int) -> Iterator[Batch]:
        order = sorted(self.loss.taught, key=lambda row: -self.loss.lengths[row])  # rows of similar length together
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            yield len(batch), partial(self._run, batch)

    def _run(self, batch: Sequence[int]) -> Tensor:
        return self.loss(batch).loss * self.loss.terms(batch)


@contextmanager
def looking(modules: Mapping[str, nn.Module], look: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `look(name, input, output)` after each run of a module, while the context is open.

    Hooks of attached adapters must be installed before, so that outputs include the adapters.

    Args:
        modules: Linear layers by name.
        look: The function to call.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
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
        def note(_module: nn.Module, _inputs: object, named: Mapping[str, object]) -> None:
            mask = named.get("attention_mask")
            self.last = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

        self._handle = self._module.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def each_batch(passes: Passes, size: int, advance: Callable[[int, str], None]) -> Iterator[Batch]:
    """Yield batches, and report each to `advance` after it is processed."""
    for rows, run in passes.batches(size):
        yield rows, run
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
