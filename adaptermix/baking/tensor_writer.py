"""Produce the output tensors one at a time and collect the per-module report."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..algebra import LowRank
from ..checkpoints.tensor_writing import bytes_of
from ..errors import OutputError, PlanError, code_of
from ..progress import Watcher
from .fidelity import Fidelity
from .journal import Finished, Journal
from .plan import BakePlan
from .report import BakedModule
from .strategies import AUTOMATIC, Baked, Insertion, Known, Rows, on_rows

KnownInputs = Callable[[str], Known | None]
"""Returns the input statistics of a weight's module, if there are any."""
_SAMPLED = 64
"""Rows of a weight in which rounding to 16 bits is measured."""
COMPARED = (*AUTOMATIC, "residual")
"""Strategies that a dry run measures in addition to the requested one."""
_ALL = (*COMPARED, "dequant-16")


class TensorWriter:
    """Produces the tensors of a result, and collects the report."""

    def __init__(self, plan: BakePlan, known: KnownInputs, journal: Journal, *, compare: bool = False) -> None:
        """Start a bake.

        Args:
            plan: The plan.
            known: Returns the statistics of inputs.
            journal: Stores finished modules for an interrupted run.
            compare: Whether other strategies are measured too.
        """
        self._plan, self._known, self._journal = plan, known, journal
        self._compares = compare
        self.modules: dict[str, BakedModule] = {}
        self.whole: list[str] = []
        self.lora: dict[str, LowRank] = {}
        self.lora_dtype = torch.float32
        self._shifts: dict[str, Tensor] = {}

    def deltas(self) -> dict[str, Callable[[], Tensor | LowRank]]:
        """Return a function per tensor of a 16-bit result that computes its delta."""
        plan = self._plan
        changed = sorted(set(plan.names) | (plan.linear if plan.strategy == "dequant-16" else set()))
        return {name: partial(self._delta, name) for name in changed}

    def _delta(self, name: str) -> Tensor | LowRank:
        """Return the change of a tensor: from its values to those of its codes, if requested, plus the delta."""
        plan, tensor = self._plan, self._plan.checkpoint.load(name)
        moved = None
        if plan.strategy == "dequant-16" and name in plan.linear:
            codes = plan.quantized(name).weight()
            moved = (codes.T if name in plan.transposed else codes) - tensor.float().to(plan.device)
            if name not in plan.names:
                return moved
        update = plan.update(name)
        rows = torch.linspace(0, len(tensor) - 1, min(len(tensor), _SAMPLED)).round().long()
        if isinstance(update, LowRank) and not plan.is_transposed(name) and tensor.ndim == 2:
            delta: Tensor | LowRank = update
            some = (update.b[rows.to(update.b.device)] * update.scale @ update.a).float().cpu()
        else:
            delta = plan.delta(name, update)
            some = delta[rows.to(delta.device)].cpu()
        start = tensor[rows].float()
        start = start if moved is None else start + moved[rows.to(moved.device)].cpu()
        kept = (start + some).to(plan.dtype_of(name, tensor.dtype)).float() - start
        measured_rows = None if plan.is_transposed(name) else self._rows_of(name)
        self._tell(name, _rounded(plan.strategy, some, kept, measured_rows))
        return delta if moved is None else moved + plan.delta(name, update)

    def groups(self, watch: Watcher) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of a quantised result; biases come after the weights of their modules."""
        plan = self._plan
        biases = {plan.bias_of(name) for name in plan.names}
        order = sorted(plan.checkpoint.tensors, key=lambda name: name in biases)
        with watch.track("bake", len(order)) as advance:
            for names in _joined(order, plan):
                finished = self._finished(names)
                for name in names:
                    if name in plan.linear:
                        yield self._quantized(name, finished)
                    elif name in plan.names:
                        yield {name: self._added(name)}
                    else:
                        tensor = plan.checkpoint.load(name)
                        result = tensor if name not in self._shifts else tensor.float() + self._shifts[name].cpu()
                        yield {name: self._narrowed(name, result, tensor.dtype)}
                    advance(1, name)

    def _finished(self, names: Sequence[str]) -> dict[str, Finished]:
        """Return the modules with a delta among some that an engine joins: all quantised, or all in 16 bits."""
        plan = self._plan
        changed = [name for name in names if name in plan.linear and name in plan.names]
        finished = {name: self._journal.read(name) or self._finish(name) for name in changed}
        if any(module.is_whole for module in finished.values()):
            for name in [name for name, module in finished.items() if not module.is_whole]:
                finished[name] = self._finish(name, whole=True)
        return finished

    def _quantized(self, name: str, finished: Mapping[str, Finished]) -> dict[str, Tensor]:
        """Return the tensors of a linear layer.

        Args:
            name: Name of the weight.
            finished: Modules with a delta that an engine joins with this one.
        """
        plan = self._plan
        if name in finished:
            self._keep(name, finished[name])
            return dict(finished[name].tensors)
        base = plan.quantized(name)
        if not any(module.is_whole for module in finished.values()):
            return _on_cpu(base.stored(name))
        self.whole.append(plan.paths.get(name, name.removesuffix(".weight")))
        return {name: self._narrowed(name, base.weight(), base.dtype).cpu()}

    def lora_bytes(self) -> int:
        """The size of the residual LoRA."""
        return sum(_factor_bytes(update, self.lora_dtype) for update in self.lora.values())

    def _added(self, name: str) -> Tensor:
        """Return a tensor that stays in 16 bits, such as an output layer, with its delta."""
        tensor = self._plan.checkpoint.load(name)
        before, delta = tensor.float().to(self._plan.device), self._plan.delta(name, self._plan.update(name))
        result = self._narrowed(name, before + delta, tensor.dtype)
        module = _rounded("merge-16", delta, result.float() - before, None)
        self._tell(
            name, replace(module, size=result.nbytes, compared=dict.fromkeys(_ALL, (module.fidelity, result.nbytes)))
        )
        return result.cpu()

    def _keep(self, name: str, finished: Finished) -> None:
        plan, bias = self._plan, self._plan.bias_of(name)
        self._tell(name, finished.module)
        if finished.is_whole:
            self.whole.append(plan.paths.get(name, name.removesuffix(".weight")))
        if finished.shift is not None and bias is not None:
            self._shifts[bias] = finished.shift
        if finished.lora is not None:
            self.lora[plan.names[name]] = finished.lora
            self.lora_dtype = finished.lora_dtype

    def _narrowed(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        result = tensor.to(self._plan.dtype_of(name, dtype))
        if result.is_floating_point() and not torch.isfinite(result).all() and torch.isfinite(tensor).all():
            raise OutputError(
                f"'{name}' must be finite in {result.dtype}, and overflows it. Choose a wider --dtype.",
                code="bake.overflow",
            )
        return result

    def _finish(self, name: str, *, whole: bool = False) -> Finished:
        """Compute a module; with `whole` it stays in 16 bits under every strategy."""
        plan, bias = self._plan, self._plan.bias_of(name)
        base, update = plan.quantized(name), plan.update(name)
        insertion = Insertion(
            base=base,
            delta=update.dense().float().to(plan.device),
            known=self._known(name),
            settle=None if bias is None else partial(self._settle, bias),
            seed=plan.settings.seed + zlib.crc32(name.encode()),
            rank=update.rank if isinstance(update, LowRank) else None,
            least=plan.settings.keep_at_least,
            most=plan.settings.error_at_most,
        )
        kept = self._narrowed(name, insertion.base.weight() + insertion.delta, base.dtype)
        in_16 = _rounded("dequant-16", insertion.delta, kept.float() - base.weight(), self._rows_of(name))
        try:
            strategy, baked = ("dequant-16", None) if whole else self._baked(insertion)
            compared = self._compared(name, insertion, in_16, kept)
        except ValueError as error:
            raise PlanError(
                f"module '{plan.names[name]}': {error}. Give more or other texts with --calibration, or another "
                "--strategy.",
                code=code_of(error, "bake.strategy-failed"),
            ) from error
        if baked is None:
            module = replace(in_16, strategy=strategy, size=kept.nbytes, compared=compared)
            stored = kept.T.contiguous() if name in plan.transposed else kept
            finished = Finished(tensors=_on_cpu({name: stored}), module=module, is_whole=True)
        else:
            baked = _storable(baked, kept.dtype)
            rows = self._rows_of(name)
            tensors = _on_cpu(baked.weight.stored(name))
            module = BakedModule(
                strategy=strategy,
                fidelity=insertion.measured(baked, rows),
                on_texts=rows is not None,
                size=_size(name, baked, kept.dtype),
                rank=None if baked.lora is None else baked.lora.rank,
                compared=compared,
            )
            finished = Finished(
                tensors=tensors, module=module, shift=baked.shift, lora=baked.lora, lora_dtype=kept.dtype
            )
        self._journal.write(name, finished)
        return finished

    def _compared(
        self, name: str, insertion: Insertion, in_16: BakedModule, kept: Tensor
    ) -> dict[str, tuple[Fidelity, int]]:
        """Return the module's fidelity and bytes under other strategies."""
        result = {"dequant-16": (in_16.fidelity, kept.nbytes)}
        has_texts = insertion.known is not None and insertion.known.is_enough
        for title in (COMPARED if has_texts else COMPARED[:1]) if self._compares else ():
            baked = _storable(insertion.by(title), kept.dtype)
            result[title] = (insertion.measured(baked, self._rows_of(name)), _size(name, baked, kept.dtype))
        return result

    def _settle(self, bias: str, shift: Tensor) -> Tensor:
        """Return the change of a bias after rounding to its storage dtype."""
        before = self._plan.checkpoint.load(bias)
        wide = before.float().to(shift.device)
        return (wide + shift).to(self._plan.dtype_of(bias, before.dtype)).float() - wide

    def _baked(self, insertion: Insertion) -> tuple[str, Baked | None]:
        """Return the result of the strategy; for `auto` the one with the least error that keeps enough, if any."""
        requested = self._plan.strategy
        chosen = insertion.automatic() if requested == "auto" else requested
        return ("dequant-16", None) if chosen is None else (chosen, insertion.by(chosen))

    def _rows_of(self, name: str) -> Rows | None:
        """Return the rows to measure a module on, if texts reached it."""
        known = self._known(name)
        return known.measured if known is not None and known.is_enough else None

    def _tell(self, name: str, module: BakedModule) -> None:
        self.modules[self._plan.names[name]] = module


def _joined(order: Sequence[str], plan: BakePlan) -> Iterator[list[str]]:
    """Yield the names of tensors in this order, those of weights that engines join in one matrix together."""
    together = plan.format.together if plan.format else ()
    members: dict[str, list[str]] = {}
    keys = {}
    for name in order:
        layer, _, module = name.removesuffix(".weight").rpartition(".")
        number = next((number for number, names in enumerate(together) if module in names), None)
        keys[name] = name if number is None or name not in plan.linear else f"{layer}:{number}"
        members.setdefault(keys[name], []).append(name)
    for key in dict.fromkeys(keys.values()):
        yield members[key]


def _rounded(strategy: str, delta: Tensor, realised: Tensor, rows: Rows | None) -> BakedModule:
    """Return the effect of rounding a delta, or some rows of it, to 16 bits."""
    return BakedModule(strategy=strategy, fidelity=on_rows(delta, realised, rows), on_texts=rows is not None)


def _storable(baked: Baked, dtype: torch.dtype) -> Baked:
    """Round a LoRA to its storage dtype."""
    lora = baked.lora
    if lora is None:
        return baked
    return replace(baked, lora=LowRank(b=lora.b.to(dtype).float(), a=(lora.scale * lora.a).to(dtype).float()))


def _factor_bytes(update: LowRank | None, dtype: torch.dtype) -> int:
    """Return the bytes of a LoRA's factors; 0 without a LoRA."""
    return 0 if update is None else update.rank * sum(update.shape) * dtype.itemsize


def _size(name: str, baked: Baked, dtype: torch.dtype) -> int:
    """Return the bytes of a module, its LoRA included."""
    return bytes_of(baked.weight.stored(name)) + _factor_bytes(baked.lora, dtype)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
