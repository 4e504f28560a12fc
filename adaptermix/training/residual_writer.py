"""The linear layer that writes a block's states, and how its output becomes the block's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PlanError
from ..models.base import BaseModel
from ..models.blocks import blocks, is_linear
from .layer_states import MiddleStates
from .lora import resolve_targets

Run = Callable[[], tuple[Tensor, Tensor]]
"""Returns the states after a block, and which tokens are there."""
Seen = Callable[[str, tuple[Tensor, ...], Tensor], Tensor | None]
"""Receives the name of a module, its inputs and its output, and may return another output."""
_STEP = 0.05
"""Size of the trial displacement, relative to the state, or to the output of a norm in between."""
_MOST_ODD = 0.25
"""Largest share of a trial displacement that may end in another direction."""
_SHRINK = 0.1
"""Penalty on displacements before a norm's gain. On Gemma 3 270M, whose norms have gains from -0.1 to hundreds, the
displacement of the map is reached to 90 % with 0.1, to 81 % with 0.001 and to 76 % with 1; without it, not at
all."""


@dataclass(frozen=True, slots=True)
class Norm:
    r"""A LayerNorm or RMSNorm, measured by its effect: $v \mapsto g \odot (v - \mu) / \sigma + \beta$.

    Args:
        gain: $g$; an RMSNorm may store it in another form, such as $g - 1$.
        centred: Whether it subtracts the mean $\mu$; else $\sigma$ is the root mean square.
    """

    gain: Float[Tensor, " d"]
    centred: bool

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """Measure a norm on vectors whose mean is 0 and whose length is known."""
        weight = module.get_parameter("weight")
        probe = torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device)
        probe[..., 1::2] = -1
        with torch.no_grad():
            plus, minus, moved = (module(vector).double() for vector in (probe, -probe, probe + 1))
        gain = ((plus - minus) / 2 * probe.double())[0, 0]
        return cls(gain, bool((moved - plus).abs().max() < 0.05 * plus.abs().max()))

    def scale(self, vectors: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows tokens 1"]:
        r"""Return $\sigma$ of each vector, in float64."""
        vectors = vectors.double()
        if self.centred:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


@dataclass(frozen=True, slots=True)
class Writer:
    r"""The linear layer that writes a block's states last.

    A change $\Delta z$ of its output changes the state by $f\, g \odot \Delta z / \sigma$, with $g$ and $\sigma$ of the
    norm that follows, if one does (1 otherwise). In post-norm blocks that is exact but for the mean and the length,
    which the norm fixes.

    Args:
        path: Its path in the model.
        norm_path: Path of the norm that follows in the same block, if one does.
        norm: What that norm does.
        factor: $f$, of models that scale what they add to the states.
    """

    path: str
    norm_path: str | None
    norm: Norm | None
    factor: float = 1.0

    def per_state(self, spread: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        r"""Return the factors from a displacement of the state to one of the output over $\sigma$.

        Without a norm that is $1 / f$. A norm fixes the length of its output, so a long displacement of dimensions that
        it nearly blocks would shrink all others: $g / (f (g^2 + \kappa s^2))$ minimises, in each dimension, the squared
        error over its spread s plus $\kappa$ times the squared displacement before the gain.

        Args:
            spread: Standard deviation of each dimension of the states.
        """
        if self.norm is None:
            return torch.full_like(spread, 1 / self.factor)
        return self.norm.gain / (self.norm.gain.square() + _SHRINK * spread.square()) / self.factor


class Tap:
    """Reads a block's states together with the inputs of its writer.

    Args:
        base: The base model.
        states: Runs the block.
        writer: The layer.
    """

    def __init__(self, base: BaseModel, states: MiddleStates, writer: Writer) -> None:
        self._model, self._states, self._writer = base.model, states, writer

    def __call__(self, encoded: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return the states after the block, which tokens count, and the layer's inputs and 1 over $\sigma$.

        Shapes: [rows tokens width], [rows tokens], [rows tokens inputs+1]; padded on the right.
        """
        inputs_of: dict[str, Tensor] = {}
        watched = {self._writer.path: "inputs"}
        if self._writer.norm_path:
            watched[self._writer.norm_path] = "normed"
        with _hooks(self._model, watched, lambda name, inputs, _: inputs_of.update({watched[name]: inputs[0]})):
            states, mask = self._states.states(encoded)
        inputs = torch.nn.functional.pad(inputs_of["inputs"].double(), (0, 1), value=1.0)
        return (
            states,
            mask,
            inputs if self._writer.norm is None else inputs / self._writer.norm.scale(inputs_of["normed"]),
        )


@contextmanager
def _hooks(model: nn.Module, names: Iterable[str], seen: Seen) -> Iterator[None]:
    """Call `seen(name, inputs, output)` after each of these modules, until the context ends."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        return lambda _module, inputs, output: seen(name, inputs, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_writer(base: BaseModel, layer: int, run: Run) -> Writer:
    """Find the linear layer that writes the states of a block last, by running the block.

    The order in which the block calls its modules, not their names, shows that layer and any norm after it. A small
    displacement of its output then shows whether the states follow as they should.

    Args:
        base: The base model.
        layer: Number of the block, from 1.
        run: Runs the blocks up to it on some sentences.

    Raises:
        PlanError: other modules (experts, a state space) write the states of this block.
    """
    path, stack = blocks(base.model)
    inside = {f"{path}.{layer - 1}.{name}": module for name, module in stack[layer - 1].named_modules() if name}
    calls: list[tuple[str, Tensor]] = []
    leaves = [name for name, module in inside.items() if not any(module.children())]
    with _hooks(base.model, leaves, lambda name, _, output: calls.append((name, output))):
        before, mask = run()
    linear = [number for number, (name, _) in enumerate(calls) if is_linear(inside[name])]
    name, output = calls[linear[-1]] if linear else ("", before[..., :0])
    suited = resolve_targets(base.model, ["all-linear"], range(layer - 1, layer))
    after = [inside[other] for other, _ in calls[linear[-1] + 1 :]] if linear else []
    mixed = any(parameter.dim() > 1 for module in after for parameter in module.parameters())  # a router of experts
    if output.shape != before.shape or mixed or name.rpartition(".")[2] not in suited:
        raise PlanError(
            f"--fit least-squares and mean-shift need a block whose states are written by one linear layer, but block "
            f"{layer} of {base.id!r} has other writers (experts or a state space). Choose another --layer, or --fit "
            "gradient.",
            code="align.fit-writer",
        )
    norms = [other for other, _ in calls[linear[-1] + 1 :] if _is_norm(inside[other], before.shape[-1])]
    writer = Writer(name, norms[-1], Norm.of(inside[norms[-1]])) if norms else Writer(name, None, None)
    return replace(writer, factor=_factor(base, run, writer, before, mask))


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (width,)


def _factor(
    base: BaseModel,
    run: Run,
    writer: Writer,
    before: Tensor,
    mask: Tensor,
) -> float:
    """Displace the states through the layer, check that they follow, and return by which factor."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(before.shape, generator=generator, dtype=torch.float64).to(before.device)
    if writer.norm and writer.norm_path:
        norm = writer.norm
        norm_scales: list[Tensor] = []
        with _hooks(base.model, [writer.norm_path], lambda _, inputs, __: norm_scales.append(norm.scale(inputs[0]))):
            run()
        step, target = _STEP * noise * norm_scales[0], _STEP * noise * norm.gain
    else:
        step = target = _STEP * noise * before.double().square().mean(-1, keepdim=True).sqrt()
    with _hooks(base.model, [writer.path], lambda _, __, output: output + step.to(output.dtype)):
        after = run()[0]
    here = mask.bool()
    usual = before[here].double().square().mean(0).sqrt().clamp_min(1e-12)  # long dimensions are rounded more coarsely
    moved, target = (after.double() - before.double())[here] / usual, target[here] / usual
    factor = float((moved * target).sum() / target.square().sum())
    odd = float((moved - factor * target).norm() / moved.norm().clamp_min(1e-30))
    if not odd < _MOST_ODD or factor <= 0:
        raise PlanError(
            "--fit least-squares and mean-shift need a block whose states follow the linear layer that writes them, "
            f"and those of '{writer.path}' of {base.id!r} do not ({odd:.0%} go elsewhere). Choose another --layer, or "
            "--fit gradient.",
            code="align.fit-order",
        )
    return 1.0 if abs(factor - 1) < 0.1 else factor
