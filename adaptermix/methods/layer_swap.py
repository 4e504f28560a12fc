"""Layer swapping: the outer blocks of a language adapter around the middle blocks of a task adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..algebra import Stack
from ..errors import InvalidValueError
from .base import LinearMethod, method

_PUBLISHED = {"bottom": 5 / 32, "top": 2 / 32}
"""Share of the blocks that the paper takes from the language expert."""


@method("layer-swap")
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSwap(LinearMethod):
    r"""Take the bottom and top blocks from a language or alignment adapter, and the blocks between from a task adapter.

    Of two adapters, task first, at block l of L:

        $\Delta_l = (1 - s_l) w_1 \tau_{task,l} + s_l w_2 \tau_{language,l}$,

    with $s_l$ 1 in the first `bottom` and the last `top` blocks, `share` in the `transition` blocks next to them, and 0
    between. A block that the language adapter does not adapt is that of the base model where $s_l$ is 1. What lies
    outside the blocks (embeddings, a pooler, a head) is the task adapter's.

    Give both adapters weight 1 and let a search find the borders: `search task align --method layer-swap --space free
    --grid 1 --vary bottom=0,2,4,6 --vary top=0,2`, or `--bounds 1,1 --trials 20 --vary bottom=0:6 --vary top=0:4`.

    Args:
        bottom: Blocks at the bottom that come from the language adapter; None is the paper's 5 of 32, rounded.
        top: Blocks at the top that do; None is the paper's 2 of 32, rounded.
        transition: Blocks next to each of these borders in which both are averaged.
        share: Share of the language adapter there, in [0, 1].
        blocks: Number of blocks of the model; None takes one more than the last that an adapter adapts, in each stack:
            an encoder and a decoder, or the parts for images and for text, are separate stacks.

    Shapes: k updates [out in] give one [out in].
    Differs from the paper: weights. The paper swaps whole layers of fully tuned models (its follow-up LoRAs, too),
    since languages live in the outer blocks and reasoning between, and averages one block at each border. An alignment
    adapter acts up to the block that it aligns, so its best borders may be others: search them.
    Exact when: always.
    Reference: Bandarkar et al., Layer Swapping for Zero-Shot Cross-Lingual Transfer, ICLR 2025, arXiv 2410.01335;
    Bandarkar and Peng, The Unreasonable Effectiveness of Model Merging for Cross-Lingual Transfer, MRL 2025,
    arXiv 2505.18356.
    """

    roles: ClassVar[tuple[str, ...]] = ("the task adapter", "the language or alignment adapter")

    bottom: int | None = None
    top: int | None = None
    transition: int = 1
    share: float = 0.5
    blocks: int | None = None

    def __post_init__(self) -> None:
        for name in ("bottom", "top", "transition"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidValueError(f"{name} must be at least 0, got {value}", code="method.negative")
        if not 0 <= self.share <= 1:
            raise InvalidValueError(f"share must be in [0, 1], got {self.share!r}", code="method.share")
        if self.blocks is not None and self.blocks < 1:
            raise InvalidValueError(f"blocks must be at least 1, got {self.blocks}", code="method.blocks")

    def check_depth(self, depth: int) -> None:
        """Refuse borders that lie outside the model, and a number of blocks that is too small for the adapters.

        Raises:
            ValueError: they do, or it is.
        """
        blocks = depth if self.blocks is None else self.blocks
        if blocks < depth:
            raise InvalidValueError(
                f"blocks must be at least the number that the adapters have, {depth}, got {blocks}",
                code="method.blocks",
            )
        for name in ("bottom", "top"):
            expected = getattr(self, name)
            if expected is not None and expected > blocks:
                more = (
                    "" if self.blocks else "; if the model has more than the adapters adapt, set blocks to its number"
                )
                raise InvalidValueError(
                    f"{name} must be at most the number of blocks, {blocks}, got {expected}{more}",
                    code="method.too-many-layers",
                )

    def coefficients(self, stack: Stack) -> Sequence[float]:
        """Return each adapter's weight times its share of the block."""
        depth = stack.depth if self.blocks is None else self.blocks
        sides = [
            round(published * depth) if getattr(self, name) is None else getattr(self, name)
            for name, published in _PUBLISHED.items()
        ]
        language = self._language_share(stack.block, depth, *sides)
        shares = (1 - language, language)
        return [weight * shares[index] for index, weight in zip(stack.indices, stack.weights, strict=True)]

    def _language_share(self, block: int | None, depth: int, bottom: int, top: int) -> float:
        """Return the share of the language adapter in a block."""
        if block is None:
            return 0.0
        # Distances into the middle from both borders; below 0 within the swapped blocks.
        distances = [block - bottom] * (bottom > 0) + [depth - 1 - block - top] * (top > 0)
        if any(distance < 0 for distance in distances):
            return 1.0
        return self.share if any(distance < self.transition for distance in distances) else 0.0
