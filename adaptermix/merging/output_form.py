"""The form of a merged update: factors as they come, factors of a chosen rank, or a dense matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..algebra import Dense, LowRank, Update, least_rank, singular_values, truncate
from ..algebra.lowrank import balanced, decompose, lost_share, working_dtype
from ..algebra.storage import to_storage
from ..algebra.subspaces import numerical_rank
from ..errors import OutputError, PlanError

Form = Literal["concat", "lowrank", "dense"]
Rank = int | Literal["auto"]
KEEP = 0.999
"""Default share of the squared norm that an automatic rank keeps."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Formed:
    """An update in its final form.

    Args:
        update: The update.
        residual: Share of the norm lost to truncation and to rounding, in [0, 1].
        excess: Bound on how far the residual is above the least possible for the rank, as a share of it.
        rounding: Share of the norm lost to rounding alone.
    """

    update: Update
    residual: float = 0.0
    excess: float = 0.0
    rounding: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Form in which the result is stored.

    Args:
        form: "concat" keeps the method's factors, "lowrank" recompresses, "dense" keeps or makes full matrices; None
            means "lowrank" if `rank` is set or the method's result is dense, else "concat".
        rank: Rank of "lowrank", or "auto" for the least that keeps `keep`.
        keep: Share of the squared norm of each module that an automatic rank keeps.
        dtype: Storage dtype of the factors, rounded so that their product changes little; None does not round.

    Raises:
        PlanError: the arguments contradict each other.
    """

    form: Form | None = None
    rank: Rank | None = None
    keep: float = KEEP
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.form not in (None, "concat", "lowrank", "dense"):
            raise PlanError(f"--form must be concat, lowrank or dense, got {self.form!r}.", code="form.unknown")
        if not (self.rank is None or self.rank == "auto" or type(self.rank) is int):
            raise PlanError(
                f"--rank must be a whole number of at least 1, or auto, got {self.rank!r}.", code="rank.not-number"
            )
        if isinstance(self.rank, int) and self.rank < 1:
            raise PlanError(f"--rank must be at least 1, got {self.rank}.", code="rank.too-small")
        if self.rank is not None and self.form in ("concat", "dense"):
            raise PlanError(
                f"--rank goes with --form lowrank, got --form {self.form}. Leave one of them out.",
                code="rank.with-form",
            )
        if not 0 < self.keep <= 1:
            raise PlanError(f"--keep must be in (0, 1], got {self.keep:g}.", code="rank.keep")

    def apply(self, update: Update, *, fallback: int, largest: int | None) -> Formed:
        """Bring a merged update into the form.

        Args:
            update: Result of the method.
            fallback: Rank for a dense result if `rank` is not set: the sum of the ranks of the inputs.
            largest: Largest rank of the inputs, for methods that cut to it; None for others.

        Raises:
            PlanError: the form is "concat", but the result is dense.
        """
        if self.form == "dense":
            cut = Formed(update=update)
            if largest is not None and isinstance(update, LowRank) and largest < update.rank:
                cut = _cut(update, largest, self.keep)
            return replace(cut, update=Dense(w=cut.update.to(working_dtype([update])).dense()))
        rank: Rank | None = self.rank if self.rank is not None or self.form == "concat" else largest
        if rank is None and self.form == "lowrank":
            raise PlanError(
                "--form lowrank needs a rank: pass --rank R, or --rank auto with --keep SHARE.", code="form.no-rank"
            )
        if isinstance(update, Dense):
            if self.form == "concat":
                raise PlanError(
                    "--form concat needs a method whose result is low rank, and this method's is dense. "
                    "Use --form lowrank with --rank, or --form dense.",
                    code="form.concat-dense",
                )
            return _cut_dense(update, rank or fallback, self.keep)
        if rank is None or (rank != "auto" and rank >= update.rank):
            return Formed(update=update)
        return _cut(update, rank, self.keep)

    def rounded(self, formed: Formed, module: str, length: float) -> Formed:
        """Round factors to the storage dtype, if there is one, and add the loss to the result.

        Args:
            formed: The result of `apply`.
            module: Path of the module, for the message.
            length: Norm of the whole update.

        Raises:
            OutputError: a factor overflows the dtype.
        """
        if self.dtype is None or not isinstance(formed.update, LowRank):
            return formed
        update, lost = to_storage(formed.update, self.dtype)
        if math.isinf(lost):
            name = str(self.dtype).removeprefix("torch.")
            raise OutputError(
                f"the factors of module '{module}' must be finite in {name}, and overflow it. "
                "Choose a wider dtype or smaller weights.",
                code="write.overflow",
            )
        share = lost / length if length > 0 else 0.0
        # The two losses are orthogonal: the rounded factors span the directions that truncation keeps.
        return replace(formed, update=update, residual=math.hypot(formed.residual, share), rounding=share)


def _cut(update: LowRank, rank: Rank, keep: float) -> Formed:
    u, sigma, vh = decompose(update)
    chosen = rank if rank != "auto" else least_rank(sigma, keep)
    if rank == "auto":  # factors that cancel leave only rounding, which has no rank
        size = abs(update.scale) * float(update.b.double().norm() * update.a.double().norm())
        chosen = max(1, min(chosen, numerical_rank(sigma, update.shape, size=size)))
    low = balanced(u, sigma, vh, rank=chosen, dtype=working_dtype([update]))
    return Formed(update=low, residual=lost_share(sigma, chosen))


def _cut_dense(update: Dense, rank: Rank, keep: float) -> Formed:
    if rank != "auto":
        truncated = truncate(update.w, rank)
        return Formed(update=truncated.update, residual=truncated.residual, excess=truncated.excess)
    side, guess = min(update.shape), 32
    total = float(torch.linalg.vector_norm(update.w, dtype=torch.float64)) ** 2
    while True:
        truncated = truncate(update.w, min(guess, side))
        if guess >= side or 1 - truncated.residual**2 >= keep:
            break
        guess *= 2
    sigma = singular_values(truncated.update)
    low = _cut(truncated.update, least_rank(sigma, keep, total=total), keep).update
    # Both losses are orthogonal. Subtracting the norm that is kept from the total would cancel a small tail.
    tail = float(sigma[low.rank if isinstance(low, LowRank) else side :].square().sum())
    return Formed(
        update=low,
        residual=(truncated.residual**2 + tail / total) ** 0.5 if total > 0 else 0.0,
        excess=truncated.excess,
    )
