"""What every kind of adapter module can do; a plain LoRA is its simplest case."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...algebra import LowRank, Update
from ..module import AdapterModule
from ..state import AdapterMeta


class AdapterKind:
    """A kind of adapter module: how its tensors change the weight that they belong to.

    A plain LoRA adds the product of its factors, whatever the weight is. Other kinds override what differs and stand in
    `adapters.kinds.KINDS`. An adapter may be of several kinds, such as a DoRA that began as a PiSSA.
    """

    has_own_sum = False
    """Whether a weighted sum of modules of this kind is again one, by `sum`."""

    def is_of(self, meta: AdapterMeta) -> bool:
        """Return whether an adapter is of this kind."""
        raise NotImplementedError

    def describe(self, meta: AdapterMeta) -> AdapterMeta:
        """Return the description of an adapter of this kind, from that of a plain LoRA."""
        return meta

    def missing_base(self, names: Sequence[str]) -> str:
        """Return the message for adapters of this kind that are used without their base model.

        Args:
            names: Names of the adapters.
        """
        raise NotImplementedError

    def module(self, module: AdapterModule, weight: Callable[[], Float[Tensor, "out in"]]) -> AdapterModule:
        """Return a module whose factors are an update of the base weight, from the factors in the file.

        Args:
            module: The module as the file has it.
            weight: Reads the base weight.
        """
        return module

    def delta(self, module: AdapterModule, weight: Callable[[], Float[Tensor, "out in"]]) -> Update:
        """Return what the module adds to its weight."""
        return module.update

    def sum(
        self, modules: Sequence[AdapterModule], coefficients: Sequence[float], weight: Float[Tensor, "out in"]
    ) -> AdapterModule:
        """Return the weighted sum of the deltas of some modules as one module of this kind.

        Raises:
            ValueError: no module of this kind gives the sum.
        """
        raise NotImplementedError

    def with_update(self, module: AdapterModule, update: LowRank, weight: Float[Tensor, "out in"]) -> AdapterModule:
        """Return the module with factors that were truncated or rounded, and the other parts fitted to them."""
        raise NotImplementedError


def less(update: LowRank, left: Tensor, right: Tensor) -> LowRank:
    """Return an update less a product of two factors, with both sides of the product balanced."""
    dtype = torch.promote_types(update.a.dtype, torch.float32)
    lengths = right.norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny).sqrt()
    left, right = left * lengths, right / lengths[:, None]
    return LowRank(
        b=torch.cat([update.b.to(dtype), -left.to(dtype)], dim=1),
        a=torch.cat([update.scale * update.a.to(dtype), right.to(dtype)]),
    )
