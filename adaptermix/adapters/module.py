"""One module of an adapter: what it adds to one layer of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..algebra import LowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The shapes of the two factors of a module in PEFT's file.

    Args:
        kind: "linear": `lora_A.weight` [r in] and `lora_B.weight` [out r]. "embedding": `lora_embedding_A` [r num] and
            `lora_embedding_B` [dim r], so the update is [dim num], the transpose of the table. "convolution":
            `lora_A.weight` [r in *kernel] and `lora_B.weight` [out r 1 ..], so the update is [out in*prod(kernel)].
        kernel: Sizes of the kernel; empty unless it is a convolution.

    Grouped convolutions: PEFT 0.21 gives `lora_B` only r/groups columns there, and that file is refused here. Earlier
    releases stored them like any other convolution, so the file does not show the groups: the adapter is read and
    merged as a full convolution, and a newer PEFT refuses input and result.
    """

    kind: Literal["linear", "embedding", "convolution"] = "linear"
    kernel: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {list(self.kernel)}" if self.kernel else self.kind


LINEAR = Layout()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleHeader:
    """The shapes of one module, from the headers of a file.

    Args:
        out: Rows of the update; 0 if the file does not show them.
        into: Columns of the update, or 0; for a convolution, input channels times the size of the kernel.
        rank: Rank of the factors.
        scale: Factor on their product.
        layout: Shapes of the factors in the file.
        bias: Whether there is a bias inside the LoRA.
        magnitude: Whether there is a DoRA magnitude.
    """

    out: int
    into: int
    rank: int
    scale: float
    layout: Layout = LINEAR
    bias: bool = False
    magnitude: bool = False

    def fits(self, other: ModuleHeader) -> bool:
        """Return whether the updates have the same shape; a side that a file does not show matches every size."""
        sides = (self.out, other.out), (self.into, other.into)
        return all(one == two or 0 in (one, two) for one, two in sides)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterModule:
    """What an adapter adds to one module.

    Args:
        update: The low-rank update of the weight.
        bias: What the bias inside the LoRA adds to the output, already multiplied by the LoRA's scale.
        magnitude: DoRA's magnitude: the trained norm of each row of weight plus update.
        layout: Shapes of the factors in the file.

    Shapes: the update is [out in]; bias and magnitude are [out].
    """

    update: LowRank
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    layout: Layout = LINEAR

    @property
    def header(self) -> ModuleHeader:
        """Shapes and parts of the module."""
        out, into = self.update.shape
        return ModuleHeader(
            out=out,
            into=into,
            rank=self.update.rank,
            scale=self.update.scale,
            layout=self.layout,
            bias=self.bias is not None,
            magnitude=self.magnitude is not None,
        )
