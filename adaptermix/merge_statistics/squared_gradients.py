"""Mean squared gradients of linear layers, for fisher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..merging.attach import MixedRowsError
from ..models.base import BaseModel
from ..progress import SILENT, Watcher
from .passes import Passes, alone_if_mixed, each_batch, looking

Calls = list[list[Tensor]]
"""Inputs and output gradients of a module, for each of its runs in a pass."""


def squared_gradients(
    base: BaseModel, passes: Passes, modules: Mapping[str, nn.Module], *, size: int, watch: Watcher = SILENT
) -> dict[str, Tensor]:
    r"""Return the diagonal of the empirical Fisher information of the weights of linear layers, in float32.

    $F = \frac{1}{N} \sum_n (\nabla_W \log p(y_n | x_n))^2$, elementwise squares, with the labels $y_n$ of the rows.
    Each gradient is of one row: with inputs $z_t$ of a module at token $t$ and gradients $g_t$ of its outputs it is
    $\sum_t g_t z_t^T$. Its square differs from the square of a batch's gradient and from $\sum_t g_t^2 (z_t^2)^T$. The
    gradient of the weight equals the gradient of the adapter's update.

    Args:
        base: The model with the adapter on it, without dropout.
        passes: Rows with their answers.
        modules: Linear layers by name.
        size: Rows per batch.
        watch: Receives progress.

    Shapes: each [out in].

    Differs from the paper: labels are the rows' labels, while the paper samples them from the model or sums over all
    classes. A span head gives half of the log-likelihood.

    Reference: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv 2111.09832,
    section 3.
    """
    return alone_if_mixed(lambda size: _measured(base, passes, modules, size, watch), size)


def _measured(
    base: BaseModel, passes: Passes, modules: Mapping[str, nn.Module], size: int, watch: Watcher
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    calls: dict[str, Calls] = {}

    def look(name: str, inputs: Tensor, output: Tensor) -> None:
        call = [inputs.detach()]
        calls.setdefault(name, []).append(call)
        if output.requires_grad:
            output.register_hook(lambda gradient: call.append(gradient.detach()))  # type: ignore[no-untyped-call]

    def start(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_()

    # Weights are frozen, so the gradient graph starts at the embeddings.
    handle = base.model.get_input_embeddings().register_forward_hook(start)
    try:
        with (
            torch.enable_grad(),
            looking(modules, look),
            watch.track("measure gradients", passes.count) as advance,
        ):
            for rows, run in each_batch(passes, size, advance):
                calls.clear()
                loss = run()
                assert loss is not None  # noqa: S101  (for the type checker: rows have answers)
                loss.backward()  # type: ignore[no-untyped-call]
                for name in list(calls):
                    _add(sums, name, calls.pop(name), rows)
    finally:
        handle.remove()
    return {name: total.div_(passes.count) for name, total in sums.items()}


def _add(sums: dict[str, Tensor], name: str, calls: Calls, rows: int) -> None:
    """Add the squared gradients of the rows of a batch."""
    reached = [call for call in calls if len(call) == 2]
    if rows > 1 and any(part.dim() < 3 or len(part) != rows for call in reached for part in call):
        raise MixedRowsError("a module does not see the batch row by row")
    for row in range(rows):
        parts = [[part if rows == 1 else part[row] for part in call] for call in reached]
        gradient = sum(g.reshape(-1, g.shape[-1]).float().T @ z.reshape(-1, z.shape[-1]).float() for z, g in parts)
        if isinstance(gradient, Tensor):
            square = gradient.square_()
            sums[name] = sums[name].add_(square) if name in sums else square
