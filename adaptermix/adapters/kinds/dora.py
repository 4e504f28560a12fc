"""DoRA: each row of weight plus update is rescaled to a trained length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...algebra import Dense, LowRank, Update
from ...errors import InvalidValueError
from ..module import AdapterModule
from ..state import AdapterMeta
from .lora import AdapterKind

_ROWS = 1024


class Dora(AdapterKind):
    """DoRA (Liu et al., 2024). A weighted sum of DoRAs is again a DoRA."""

    has_own_sum = True

    def is_of(self, meta: AdapterMeta) -> bool:
        return meta.dora

    def describe(self, meta: AdapterMeta) -> AdapterMeta:
        return replace(meta, dora=True)

    def missing_base(self, names: Sequence[str]) -> str:
        return (
            f"a DoRA's delta depends on the base weights, so {', '.join(names)} needs the base model. "
            "Pass --base MODEL."
        )

    def delta(self, module: AdapterModule, weight: Callable[[], Float[Tensor, "out in"]]) -> Update:
        if module.magnitude is None:
            return module.update
        return Dense(w=dora_delta(weight(), module.update, module.magnitude))

    def sum(
        self, modules: Sequence[AdapterModule], coefficients: Sequence[float], weight: Float[Tensor, "out in"]
    ) -> AdapterModule:
        updates, magnitudes = [module.update for module in modules], [module.magnitude for module in modules]
        update, magnitude = merge_dora(weight, updates, magnitudes, coefficients)
        return AdapterModule(update=update, magnitude=magnitude)

    def with_update(self, module: AdapterModule, update: LowRank, weight: Float[Tensor, "out in"]) -> AdapterModule:
        # Each row keeps its gain, which truncated factors reach with another length.
        if module.magnitude is None:
            return AdapterModule(update=update)
        gains = module.magnitude / dora_row_norms(weight, module.update)
        return AdapterModule(
            update=update, magnitude=(gains * dora_row_norms(weight, update)).to(module.magnitude.dtype)
        )


def _blocks(rows: int) -> Iterator[slice]:
    """Blocks of rows, so that no whole weight is copied to float64."""
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))


def dora_row_norms(weight: Float[Tensor, "out in"], update: LowRank) -> Float[Tensor, " out"]:
    r"""Return the length of each row of weight plus update, without forming the sum.

    $\|w + s b A\|^2 = \|w\|^2 + 2 s \langle w A^T, b \rangle + s^2 \langle b (A A^T), b \rangle$ per row, in float64.

    Args:
        weight: The base weight.
        update: The update.

    Shapes: weight is [out in]; the result is [out], in float64.

    Reference: Liu et al., DoRA, ICML 2024, arXiv 2402.09353, section 4.1 (their columns are rows of a [out in] weight).
    """
    a = update.a.double()
    gram = a @ a.T
    norms = []
    for rows in _blocks(weight.shape[0]):
        w, b = weight[rows].double(), update.scale * update.b[rows].double()
        squares = (w * w).sum(dim=1) + 2 * ((w @ a.T) * b).sum(dim=1) + ((b @ gram) * b).sum(dim=1)
        norms.append(squares.clamp_min(0).sqrt())
    return torch.cat(norms)


def _gains(weight: Tensor, update: LowRank, magnitude: Tensor) -> Tensor:
    """Return the factor that DoRA applies to each row of weight plus update."""
    norms = dora_row_norms(weight, update)
    if (norms == 0).any():
        raise InvalidValueError(
            "each row of weight plus update must have a length for DoRA to rescale, and one is zero",
            code="dora.zero-row",
        )
    return magnitude.double() / norms


def dora_delta(
    weight: Float[Tensor, "out in"], update: LowRank, magnitude: Float[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    r"""Return the dense delta of a DoRA, $g (W + \Delta) - W$ with $g_j = m_j / \|W_j + \Delta_j\|$ per row.

    Args:
        weight: The base weight.
        update: The update.
        magnitude: The trained lengths.

    Shapes: weight is [out in], magnitude [out]; the result is [out in], in float32 or wider.

    Raises:
        ValueError: a row of weight plus update is zero.

    Reference: Liu et al., DoRA, ICML 2024, arXiv 2402.09353, section 4.1, equation 5.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, update.a.dtype), torch.float32)
    gains = _gains(weight, update, magnitude)
    a = update.a.double()
    dense = torch.empty(weight.shape, dtype=dtype)
    for rows in _blocks(weight.shape[0]):
        w, g = weight[rows].double(), gains[rows, None]
        # (g - 1) W + g D rather than g (W + D) - W, so that a gain near 1 loses no digits.
        dense[rows] = ((g - 1) * w + g * (update.scale * (update.b[rows].double() @ a))).to(dtype)
    return dense


def merge_dora(
    weight: Float[Tensor, "out in"],
    updates: Sequence[LowRank],
    magnitudes: Sequence[Float[Tensor, " out"] | None],
    weights: Sequence[float],
) -> tuple[LowRank, Float[Tensor, " out"]]:
    r"""Return the weighted sum of DoRAs as one DoRA, exactly.

    With gains $g_i = m_i / \|W + \Delta_i\|$ (1 for a plain LoRA), the sum of the deltas is
    $W + \sum_i w_i (g_i (W + \Delta_i) - W) = h (W + \Delta')$ with $h = 1 + \sum_i w_i (g_i - 1)$ and
    $\Delta' = \sum_i w_i (g_i / h) \Delta_i$, all per row; so its magnitude is $h \|W + \Delta'\|$.

    Args:
        weight: The base weight.
        updates: Update per adapter.
        magnitudes: Trained lengths per adapter, None for a plain LoRA.
        weights: Weight per adapter.

    Returns:
        The merged update, whose rank is the sum of the ranks, and its magnitude.

    Shapes: weight is [out in], magnitudes [out] each; the update is [out in], the magnitude [out].

    Raises:
        ValueError: a row of weight plus update is zero, or h is not positive somewhere, where no DoRA gives the sum.
    """
    gains = [
        None if magnitude is None else _gains(weight, update, magnitude)
        for update, magnitude in zip(updates, magnitudes, strict=True)
    ]
    height = torch.ones(weight.shape[0], dtype=torch.float64)
    for gain, share in zip(gains, weights, strict=True):
        height += 0 if gain is None else share * (gain - 1)
    if not (height > 0).all():
        raise InvalidValueError(
            f"the merged rows must keep a positive share of the base, and the least is {float(height.min()):g}: "
            "the weights are too large or too negative for these DoRAs",
            code="dora.cancelled",
        )
    parts = []
    for update, gain, share in zip(updates, gains, weights, strict=True):
        rows = share * update.scale * ((1.0 if gain is None else gain) / height)
        parts.append(rows[:, None] * update.b.double())
    dtype = torch.float32
    for update in updates:
        dtype = torch.promote_types(dtype, update.a.dtype)
    merged = LowRank(b=torch.cat(parts, dim=1).to(dtype), a=torch.cat([update.a.to(dtype) for update in updates]))
    return merged, (height * dora_row_norms(weight, merged)).to(dtype)
