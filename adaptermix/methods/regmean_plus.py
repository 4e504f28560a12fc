"""RegMean++: RegMean along the merged model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import method
from .regmean import RegMean


@method("regmean-plus")
@dataclass(frozen=True, slots=True, kw_only=True)
class RegMeanPlus(RegMean):
    r"""RegMean whose inputs are those of the merged model: block by block, each behind the merged blocks before it.

    $\Delta_l = (\sum_i w_i \tau_{il} G_{il}) (\sum_i w_i G_{il})^{-1}$ with $G_{il}$ the mean of $z z^T$ over the data
    of adapter i, where blocks before l are merged already and block l has adapter i alone. So each block is fitted to
    its later inputs. Needs `--base`, and data for each adapter in their order: `--texts`, or `--train` with `--task`.

    Args:
        off_diagonal: Factor on the off-diagonal entries of G ($\alpha$ in the paper), in [0, 1].
        gain: A factor on the result.

    Shapes: k updates [out in] with statistics [in in] give one [out in] of rank at most $\sum_i r_i$.
    Differs from the paper: deltas instead of weights, which is the same for one base model; weights; each G is a mean.
    Modules outside the blocks are merged last.
    Exact when: there is one adapter.
    Reference: Nguyen et al., RegMean++, TMLR 2026, arXiv 2508.03121, section 3; blocks as in their release.
    """

    learner: ClassVar[str] = "adaptermix.weight_search.block_by_block:merge_block_by_block"
