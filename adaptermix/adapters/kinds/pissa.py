"""PiSSA: training starts from the largest singular directions of the base weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...algebra import LowRank
from ..module import AdapterModule
from ..state import AdapterMeta
from .lora import AdapterKind, less


class FromBase(AdapterKind):
    """A LoRA whose training started from a part of the base weight.

    PEFT subtracts that part from the base each time it loads the adapter, so the saved factors are the delta plus that
    part.
    """

    initial: str

    def is_of(self, meta: AdapterMeta) -> bool:
        return meta.initial == self.initial

    def missing_base(self, names: Sequence[str]) -> str:
        return (
            f"adapter {', '.join(names)} started from a part of the base weights (init_lora_weights={self.initial!r}), "
            "so its delta needs the base model. Pass --base, or convert the adapter to a plain LoRA."
        )

    def module(self, module: AdapterModule, weight: Callable[[], Float[Tensor, "out in"]]) -> AdapterModule:
        # PEFT takes nothing out of embeddings, and leaves convolutions to plain LoRA.
        if module.layout.kind != "linear":
            return module
        return replace(module, update=self.plain(module.update, weight()))

    def plain(self, update: LowRank, weight: Float[Tensor, "out in"]) -> LowRank:
        """Return the delta as factors, from those in the file and the base weight."""
        raise NotImplementedError


class Pissa(FromBase):
    """PiSSA (Meng et al., 2024)."""

    initial = "pissa"

    def plain(self, update: LowRank, weight: Float[Tensor, "out in"]) -> LowRank:
        return pissa_delta(update, weight)


def pissa_delta(update: LowRank, weight: Float[Tensor, "out in"]) -> LowRank:
    r"""Return the delta of a PiSSA that was saved as it was trained, $\Delta = s B A - W_r$.

    $W_r$ is the best approximation of rank r of the base weight, which PEFT takes out of it at the start. It is found
    from the r largest eigenvectors of the smaller of $W W^T$ and $W^T W$, in float64.

    Args:
        update: The trained factors with their scale.
        weight: The base weight.

    Shapes: weight is [out in]; the result has rank 2r.

    Differs from PEFT: PEFT's SVD is in float32 and the rest is rounded to the base's dtype. Where the r-th and the next
    singular value are nearly equal, $W_r$ is ill-conditioned, there as here.

    Reference: Meng et al., PiSSA, NeurIPS 2024, arXiv 2404.02948, section 3.
    """
    w = weight.double()
    if w.shape[0] <= w.shape[1]:
        left = torch.linalg.eigh(w @ w.T).eigenvectors[:, -update.rank :]
        return less(update, left, left.T @ w)
    right = torch.linalg.eigh(w.T @ w).eigenvectors[:, -update.rank :].T
    return less(update, w @ right.T, right)
