"""Adapters on a live model, each with a weight that can be set without touching the base or merging anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterState
from ..algebra import LowRank
from ..errors import IncompatibleAdapters, InvalidValueError


class MixedRowsError(RuntimeError):
    """A module (an expert, for example) does not get a batch row by row, so rows cannot differ in weights."""


class _Branch:
    """The low-rank side path of one module: all adapters' factors side by side, one coefficient per rank."""

    def __init__(self, updates: Sequence[LowRank], owners: Sequence[int], like: Tensor) -> None:
        self.a = torch.cat([update.a.float() for update in updates]).to(like)
        self.b = torch.cat([update.b.float() for update in updates], dim=1).to(like)
        self.scales = torch.cat([torch.full((u.rank,), u.scale) for u in updates]).to(like.device)
        self.owner = torch.cat([torch.full((u.rank,), i) for u, i in zip(updates, owners, strict=True)]).to(like.device)
        self.coefficients = self.scales.to(like.dtype)
        self.is_idle = False
        self.gate: Tensor | None = None
        self._table = self.coefficients

    def weigh(self, weights: Tensor) -> None:
        """Set weights [adapters], or vectors [vectors, adapters] that `choose` assigns to the rows of a batch."""
        self.is_idle, self.gate = not bool(weights.any()), None
        self._table = (weights.to(self.scales.device)[..., self.owner] * self.scales).to(self.a.dtype)
        self.coefficients = self._table

    def choose(self, vectors: Tensor) -> None:
        self.coefficients = self._table[vectors.to(self._table.device)].unsqueeze(1)

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.is_idle and self.gate is None:
            return output
        values, coefficients = inputs[0], self.coefficients
        if self.gate is not None:
            coefficients = (self.gate[self.owner] * self.scales).to(self.a.dtype)
        elif coefficients.dim() > 1 and (values.dim() != 3 or len(values) != len(coefficients)):
            raise MixedRowsError(
                "rows of a batch reach this module in another order, so each cannot have its own weights"
            )
        hidden = nn.functional.linear(values.to(self.a.dtype), self.a) * coefficients
        return output + nn.functional.linear(hidden, self.b).to(output.dtype)


class Attachment:
    r"""Adapters attached to a model: each adapted module gives $W x + \sum_i w_i s_i B_i A_i x$.

    Use as a context manager; leaving the block removes the adapters from the model.

    Args:
        model: The base model; its parameters are never written.
        adapters: The adapters, in the order of the weights. An adapter need not have every module.
        weights: Starting weights, one per adapter; 1 for each if not given.

    Raises:
        IncompatibleAdapters: a module of an adapter is not in the model, or has another shape.
        ValueError: the count of weights does not match.

    Relations: equals `merge(..., method="exact")` followed by loading the result, without writing anything; a change of
    weights costs one small vector per module.
    """

    def __init__(
        self, model: nn.Module, adapters: Sequence[AdapterState], weights: Sequence[float] | None = None
    ) -> None:
        for adapter in adapters:
            if adapter.beyond_linear:
                raise IncompatibleAdapters(
                    f"only plain LoRAs on linear layers can be attached, and this adapter has "
                    f"{', '.join(adapter.beyond_linear)}. Load it with peft.",
                    code="attach.not-lora",
                )
        self._count = len(adapters)
        updates_of: dict[str, list[tuple[int, LowRank]]] = {}
        for index, adapter in enumerate(adapters):
            for module, update in adapter.updates.items():
                updates_of.setdefault(module, []).append((index, update))
        modules = dict(model.named_modules())
        targets = {name: _target(modules, name, updates) for name, updates in updates_of.items()}
        self._branches: dict[str, _Branch] = {}
        for name, updates in updates_of.items():
            like = targets[name].weight
            reference = (
                like if like.is_floating_point() else next(p for p in model.parameters() if p.is_floating_point())
            )
            self._branches[name] = _Branch([u for _, u in updates], [i for i, _ in updates], reference)
        # Weights first: a count that is refused must not leave hooks on the model.
        self.set_weights(weights if weights is not None else [1.0] * self._count)
        self._handles = [targets[name].register_forward_hook(branch) for name, branch in self._branches.items()]

    def set_weights(self, weights: Sequence[float]) -> None:
        """Set one weight per adapter, in place, at once for every module.

        Raises:
            ValueError: the count does not match.
        """
        if len(weights) != self._count:
            raise InvalidValueError(
                f"one weight per adapter is needed, got {len(weights)} for {self._count}", code="attach.weights-count"
            )
        self.set_weights_by_module(lambda _module: weights)

    def set_weights_by_module(self, weights_of: Callable[[str], Sequence[float]]) -> None:
        """Set the weights of each module, one per adapter, from a function of its path."""
        for module, branch in self._branches.items():
            branch.weigh(torch.tensor(list(weights_of(module)), dtype=torch.float32))

    def set_several(self, vectors: Sequence[Callable[[str], Sequence[float]]]) -> None:
        """Set several weight vectors, each a function of the module's path; `choose` assigns them to rows."""
        for module, branch in self._branches.items():
            branch.weigh(torch.tensor([list(weights_of(module)) for weights_of in vectors], dtype=torch.float32))

    def choose(self, vectors: Sequence[int]) -> None:
        """Select, for each row of the next passes, one of the vectors of `set_several`.

        A pass raises `MixedRowsError` if a module does not get the batch row by row.
        """
        rows = torch.tensor(list(vectors), dtype=torch.long)
        for branch in self._branches.values():
            branch.choose(rows)

    def learn(self, group_of: Callable[[str], str], weights: Sequence[float]) -> dict[str, nn.Parameter]:
        """Replace the weights by trainable gates; return the gates by group.

        Args:
            group_of: Returns the group of a module path; the modules of a group share one gate per adapter.
            weights: Initial values of the gates, one per adapter.

        Shapes: each gate [adapters], in float32.
        """
        gates: dict[str, nn.Parameter] = {}
        for module, branch in self._branches.items():
            start = torch.tensor(list(weights), dtype=torch.float32, device=branch.scales.device)
            branch.gate = gates.setdefault(group_of(module), nn.Parameter(start))
        return gates

    @property
    def count(self) -> int:
        """Number of adapters."""
        return self._count

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the adapted modules."""
        return tuple(self._branches)

    def detach(self) -> None:
        """Remove the adapters from the model."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _target(modules: dict[str, nn.Module], name: str, updates: Sequence[tuple[int, LowRank]]) -> Any:
    """Return the adapted module; check its shape if it is a linear layer."""
    module = modules.get(name)
    if module is None or not hasattr(module, "weight"):
        raise IncompatibleAdapters(
            f"module '{name}' of the adapter must be in the model, and is not. It was trained on another base model.",
            code="base.no-module",
        )
    out, into = getattr(module, "out_features", None), getattr(module, "in_features", None)
    for _, update in updates:
        if out is not None and update.shape != (out, into):
            raise IncompatibleAdapters(
                f"module '{name}': the adapter's update is {list(update.shape)}, the model's weight [{out}, {into}]. "
                "The adapter was trained on another base model.",
                code="base.update-shape",
            )
    return module
