"""The input of every merge: the updates of one module, a weight for each, and the names of their adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .lowrank import concatenate, working_dtype
from .updates import Dense, LowRank, Update

BLOCK = 2**20
"""Entries of one update that are worked on at a time on a CPU; a GPU takes 64 times as many."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stack:
    r"""The updates $\Delta_1 \dots \Delta_k$ of one module and their weights $w_1 \dots w_k$.

    Args:
        updates: All of one shape.
        weights: One per update; any sign.
        names: Name of each adapter, which determines its random draws; default their positions.
        module: Path of the module, which determines the random draws too.
        seed: Seed of the random draws; None if no method may draw.
        statistics: For data-based methods, one tensor per update.
        tensor_shape: Shape of the tensor in the model, where it is not a matrix: a vector [out] is one column here, a
            kernel [out ...] is flattened.
        adapters: What users call the adapters of the whole merge, also those that are left out here.
        indices: Index in `adapters` of each update; default their positions.
        block: Number of the model's block that the module lies in; None outside the blocks.
        depth: Number of blocks of the module's stack, according to the adapters.

    Shapes: each update is [out in].

    Raises:
        ValueError: no update, shapes that differ, or a count that does not match.
    """

    updates: tuple[Update, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...] = ()
    module: str = ""
    seed: int | None = None
    statistics: tuple[Tensor, ...] = ()
    tensor_shape: tuple[int, ...] = ()
    adapters: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    block: int | None = None
    depth: int = 0

    def __post_init__(self) -> None:
        shapes = {update.shape for update in self.updates}
        if len(shapes) != 1:
            raise ValueError(f"updates of one shape are needed, got {sorted(shapes)}")
        if len(self.weights) != len(self.updates):
            raise ValueError(f"one weight per update is needed, got {len(self.weights)} for {len(self.updates)}")
        if not self.names:
            object.__setattr__(self, "names", tuple(str(index) for index in range(len(self.updates))))
        if not self.indices:
            object.__setattr__(self, "indices", tuple(range(len(self.updates))))
        if len(set(self.names)) != len(self.updates):
            raise ValueError(f"one distinct name per update is needed, got {list(self.names)}")

    @staticmethod
    def of(updates: Sequence[Update], weights: Sequence[float] | None = None, *, seed: int | None = None) -> Stack:
        """Return a stack of updates, each of weight 1 by default."""
        return Stack(
            updates=tuple(updates),
            weights=tuple(1.0 for _ in updates) if weights is None else tuple(map(float, weights)),
            seed=seed,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the updates."""
        return self.updates[0].shape

    @property
    def device(self) -> torch.device:
        """Where the updates are."""
        first = self.updates[0]
        return first.w.device if isinstance(first, Dense) else first.a.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: that of the widest tensor, at least float32."""
        return working_dtype(self.updates)

    def weighted(self, weights: Sequence[float]) -> Stack:
        """Return the stack with other weights."""
        return replace(self, weights=tuple(weights))

    def combined(self, coefficients: Sequence[float]) -> Update:
        r"""Return $\sum_i c_i \Delta_i$: factors laid side by side, or one dense matrix where an update is dense."""
        low = [update for update in self.updates if isinstance(update, LowRank)]
        if len(low) == len(self.updates):
            return concatenate(low, coefficients)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        factors = torch.tensor(list(coefficients), dtype=self.dtype, device=self.device)
        for first, block in self.blocks():
            total[first : first + block.shape[1]] = torch.einsum("k,krn->rn", factors, block)
        return Dense(w=total)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "k rows in"]]]:
        """Yield (first row, the next rows of every update as a matrix); the caller may overwrite these tensors.

        Low-rank updates are multiplied out a few rows at a time, so that a merge needs little memory but its result.
        """
        out, into = self.shape
        most = BLOCK if self.device.type == "cpu" else 64 * BLOCK
        step = max(1, min(out, most // into))
        dtype = self.dtype
        wide = [update.to(dtype) for update in self.updates]
        for first in range(0, out, step):
            rows = slice(first, min(first + step, out))
            block = torch.empty(len(wide), rows.stop - first, into, dtype=dtype, device=self.device)
            for index, update in enumerate(wide):
                if isinstance(update, Dense):
                    block[index] = update.w[rows]
                else:
                    torch.mm(update.b[rows] * update.scale, update.a, out=block[index])
            yield first, block
