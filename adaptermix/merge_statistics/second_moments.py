"""Mean products of the inputs of linear layers, for regmean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..baking.activations import Sums, width_of
from ..merging.attach import MixedRowsError
from ..models.base import BaseModel
from ..progress import SILENT, Watcher
from .passes import Mask, Passes, alone_if_mixed, each_batch, looking


def second_moments(
    base: BaseModel, passes: Passes, modules: Mapping[str, nn.Module], *, size: int, watch: Watcher = SILENT
) -> dict[str, Tensor]:
    r"""Return $\frac{1}{n} \sum_t z_t z_t^T$ over the tokens $t$ that each module reads, in float32.

    Padding does not count. A module without inputs has zeros.

    Args:
        base: The model with the adapter on it.
        passes: The model's inputs.
        modules: Linear layers by name; modules with the same input share one name.
        size: Rows per batch.
        watch: Receives progress.

    Shapes: each [in in].

    Reference: Jin et al., Dataless Knowledge Fusion, ICLR 2023, arXiv 2212.09849, section 3, with the mean for the sum.
    """
    return alone_if_mixed(lambda size: _measured(base, passes, modules, size, watch), size)


@torch.no_grad()
def _measured(
    base: BaseModel, passes: Passes, modules: Mapping[str, nn.Module], size: int, watch: Watcher
) -> dict[str, Tensor]:
    sums = {name: Sums.of(width_of(module), base.device) for name, module in modules.items()}
    rows = 0

    def look(name: str, inputs: Tensor, _output: Tensor) -> None:
        sums[name].add(_tokens(inputs, mask.last, rows).float())

    with (
        looking(modules, look),
        Mask(base) as mask,
        watch.track("measure inputs", passes.count) as advance,
    ):
        for count, run in each_batch(passes, size, advance):
            rows = count
            run()
    return {name: _moment(sums.pop(name)) for name in list(sums)}


def _moment(sums: Sums) -> Tensor:
    read = sums.read()
    return read.covariance.addr_(read.mean, read.mean)


def _tokens(inputs: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """Return the inputs of a module without padding, [tokens in].

    Raises:
        MixedRowsError: the positions of padding are unknown.
    """
    tokens = inputs.reshape(-1, inputs.shape[-1])
    if mask is None or bool(mask.all()):
        return tokens
    if inputs.dim() == 3 and inputs.shape[:2] == mask.shape:
        return tokens[mask.reshape(-1)]
    if rows > 1:
        raise MixedRowsError("inputs do not come row by row")
    return tokens
