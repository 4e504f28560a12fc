"""The space in which a method merges: the full matrices, or the core space of the updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..algebra import Core, Dense, Stack, Update, core_of
from ..algebra.operators import chain
from .base import StackMethod

Space = Literal["full", "core"]
"""The space of the entries: the full matrices, or the core of the updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceMethod(StackMethod):
    r"""A chain of operators on the entries of the updates themselves, or of their core.

    In core space each update is represented by its matrix $M_i$ in bases that all share, $\tau_i = U M_i V^T$; these
    are merged, and $U M V^T$ is the result, so it is of low rank and no [out in] matrix is formed (Panariello et al.,
    Accurate and Efficient Low-Rank Model Merging in Core Space, NeurIPS 2025, arXiv 2509.17786, section 4). Vectors,
    and matrices of one row or column, have no directions to share and do not change.
    """

    space: Space = "full"

    @property
    def gives_dense(self) -> bool:
        """Whether the result is a full matrix for all kinds of updates."""
        return self.space == "full"

    def __call__(self, stack: Stack) -> Update:
        """Run the chain in the space."""
        if not has_core(self.space, stack):
            return chain(stack, self.operators())
        core = core_of(stack.updates)
        return core.update(chain(_in_core(stack, core), self.operators()).w, stack.dtype)

    def entered(self, stack: Stack) -> Stack:
        """Return the stack whose entries the chain works on."""
        return _in_core(stack, core_of(stack.updates)) if has_core(self.space, stack) else stack


def has_core(space: Space, stack: Stack) -> bool:
    """Return whether the updates of a module are merged in their core: vectors have no directions to share."""
    return space == "core" and 1 not in stack.shape


def core_shape(stack: Stack) -> tuple[int, int]:
    """Return the shape of the matrices that the updates of a module are in core space."""
    rows, columns = core_of(stack.updates).parts[0].shape
    return rows, columns


def _in_core(stack: Stack, core: Core) -> Stack:
    """Return a stack with the core's matrices instead of the updates."""
    return replace(stack, updates=tuple(Dense(w=part.to(stack.dtype)) for part in core.parts), tensor_shape=())
