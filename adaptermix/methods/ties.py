"""TIES: trim, elect sign, disjoint mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from ..algebra import Stack
from ..algebra.operators import DisjointMean, Elect, Gain, Operator, Total, Trim, Weigh
from ..algebra.selection import Threshold, model_threshold
from ..errors import InvalidValueError
from .base import Stacks, method, require_share
from .space import SpaceMethod

Order = Literal["elect-first", "scale-first"]


def consensus(order: Order, *, normalize: bool, gain: float) -> tuple[Operator, ...]:
    """Return the part of the chain that elects signs and reduces, in one of the two published orders."""
    mean: dict[Order, tuple[Operator, ...]] = {
        "elect-first": (Elect(), DisjointMean(by="count")) if normalize else (Elect(), Weigh(), Total()),
        "scale-first": (Weigh(), Elect(), DisjointMean(by="weight") if normalize else Total()),
    }
    if order not in mean:
        raise InvalidValueError(f"order must be one of {', '.join(mean)}, got {order!r}", code="method.order")
    return (*mean[order], Gain(factor=gain))


@method("ties")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ties(SpaceMethod):
    r"""Merge deltas after removing small entries and sign conflicts.

    For updates $\tau_i$ with weights $w_i$, entry by entry:

        $\hat\tau_i = trim(\tau_i, density)$, the largest entries by size;
        $\gamma = sgn(\sum_i \hat\tau_i)$, the elected sign, 0 counting as +;
        $\Delta = \lambda \, mean\{w_i \hat\tau_i : sgn(\hat\tau_i) = \gamma\}$ over the survivors.

    Args:
        density: Share of entries kept per adapter, in (0, 1]; the count is rounded down, and at least one.
        gain: $\lambda$, a factor on the result.
        order: "elect-first" elects on unweighted updates and divides by the count of survivors (PEFT);
            "scale-first" elects on weighted updates and divides by the weight of the survivors (mergekit).
        normalize: Divide at all; if not, survivors are added up.
        scope: "module" trims each module separately (PEFT, mergekit), "model" each adapter over all its modules, as the
            authors' code trims (its election differs: there a sum of zero takes the sign of the majority).
        space: "full" trims and elects the entries of the deltas. "core" does so to the entries of the matrices $M_i$ of
            $\tau_i = U M_i V^T$, where U and V are bases that all deltas share, and multiplies the result by them: its
            rank is at most $\sum_i r_i$, and no [out in] matrix is formed. Vectors, and matrices of one row or column,
            are merged directly. Where singular values of the deltas side by side coincide, U and V are not unique.
            What rounding leaves between an adapter and its 16-bit copy counts as further directions.

    Shapes: k updates [out in] give one [out in], dense or, in core space, of low rank.
    Differs from the paper: weights; trimming per module by default. Differs from PEFT: an adapter of weight 0 has no
    vote on the signs. In core space the paper's bases are the singular vectors of the factors side by side, which
    depend on how each delta is split into factors; here they are those of the deltas side by side.
    Exact when: density is 1 and no signs conflict; then it is the mean over the non-zero entries.
    Reference: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708, section 4; for core space Panariello
    et al., Accurate and Efficient Low-Rank Model Merging in Core Space, NeurIPS 2025, arXiv 2509.17786.
    """

    factor: ClassVar[str | None] = "gain"

    density: float = 0.2
    gain: float = 1.0
    order: Order = "elect-first"
    normalize: bool = True
    scope: Literal["module", "model"] = "module"
    thresholds: Mapping[str, Threshold] = field(
        default_factory=dict, metadata={"internal": True}, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        require_share("density", self.density)
        if self.scope not in ("module", "model"):
            raise InvalidValueError(f"scope must be module or model, got {self.scope!r}", code="method.scope")
        self.operators()

    def operators(self) -> Sequence[Operator]:
        """Return the chain."""
        trim = Trim(density=self.density, kept=dict(self.thresholds))
        return (trim, *consensus(self.order, normalize=self.normalize, gain=self.gain))

    def fit(self, stacks: Stacks) -> Ties:
        """Find each adapter's threshold over the whole model, where the scope asks for it."""
        if self.scope == "module" or self.density == 1:
            return self

        def entered() -> Iterator[Stack]:
            return (self.entered(stack) for stack in stacks())

        names = dict.fromkeys(name for stack in stacks() for name in stack.names)
        return replace(self, thresholds={name: model_threshold(entered, name, self.density) for name in names})
