"""The tensors of a bake, made one after another, and what is told of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..algebra import LowRank
from ..checkpoints.tensor_writing import bytes_of
from ..errors import OutputError, PlanError
from ..progress import Watcher
from .fidelity import Fidelity
from .journal import Journal
from .plan import BakePlan
from .report import BakedModule
from .strategies import AUTOMATIC, Baked, Known, Rows, Wanted, on_rows

KnownInputs = Callable[[str], Known | None]
"""Returns what is known of the inputs of a weight's module, if anything."""
_SAMPLED = 64
"""Rows of a weight whose rounding to 16 bits is measured."""
COMPARED = (*AUTOMATIC, "residual")
"""What a dry run measures beside what was asked for."""
_ALL = (*COMPARED, "dequant-16")


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """One module of a quantised result.

    Args:
        tensors: What is stored, by name.
        module: What is told of it.
        is_whole: Whether it stays in 16 bits.
        shift: What is to be added to its bias.
        beside: A LoRA that stays beside it.
        beside_dtype: What its factors are rounded to.
    """

    tensors: Mapping[str, Tensor]
    module: BakedModule
    is_whole: bool = False
    shift: Tensor | None = None
    beside: LowRank | None = None
    beside_dtype: torch.dtype = torch.float32


class Work:
    """Makes the tensors of a result, and keeps what is told of them."""

    def __init__(self, plan: BakePlan, known: KnownInputs, journal: Journal, *, compare: bool = False) -> None:
        """Begin.

        Args:
            plan: What is written into what.
            known: What is known of inputs.
            journal: Keeps what is finished, for an interrupted run.
            compare: Whether other strategies are measured too.
        """
        self._plan, self._known, self._journal = plan, known, journal
        self._compares = compare
        self.modules: dict[str, BakedModule] = {}
        self.whole: list[str] = []
        self.beside: dict[str, LowRank] = {}
        self.beside_dtype = torch.float32
        self._shifts: dict[str, Tensor] = {}

    def deltas(self) -> dict[str, Callable[[], Tensor | LowRank]]:
        """Return what makes the delta of each tensor of a result in 16 bits."""
        plan = self._plan
        changed = sorted(set(plan.names) | (plan.linear if plan.strategy == "dequant-16" else set()))
        return {name: partial(self._delta, name) for name in changed}

    def _delta(self, name: str) -> Tensor | LowRank:
        """Return what is added to a tensor: from its own values to those of its codes, if meant, and the delta."""
        plan, tensor = self._plan, self._plan.checkpoint.load(name)
        moved = None
        if plan.strategy == "dequant-16" and name in plan.linear:
            codes = plan.quantized(name).weight()
            moved = (codes.T if name in plan.turned else codes) - tensor.float().to(plan.device)
            if name not in plan.names:
                return moved
        update = plan.update(name)
        rows = torch.linspace(0, len(tensor) - 1, min(len(tensor), _SAMPLED)).round().long()
        if isinstance(update, LowRank) and not plan.is_turned(name) and tensor.ndim == 2:
            delta: Tensor | LowRank = update
            some = (update.b[rows.to(update.b.device)] * update.scale @ update.a).float().cpu()
        else:
            delta = plan.delta(name, update)
            some = delta[rows.to(delta.device)].cpu()
        start = tensor[rows].float()
        start = start if moved is None else start + moved[rows.to(moved.device)].cpu()
        kept = (start + some).to(plan.dtype_of(name, tensor.dtype)).float() - start
        held = None if plan.is_turned(name) else self._held(name)
        self._tell(name, _rounded(plan.strategy, some, kept, held))
        return delta if moved is None else moved + plan.delta(name, update)

    def groups(self, watch: Watcher) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of a quantised result; biases come after the weights of their modules."""
        plan = self._plan
        biases = {plan.bias_of(name) for name in plan.names}
        order = sorted(plan.checkpoint.tensors, key=lambda name: name in biases)
        with watch.track("bake", len(order)) as advance:
            for name in order:
                if name not in plan.linear and name in plan.names:
                    yield {name: self._added(name)}
                elif name not in plan.linear:
                    tensor = plan.checkpoint.load(name)
                    found = tensor if name not in self._shifts else tensor.float() + self._shifts[name].cpu()
                    yield {name: self._narrowed(name, found, tensor.dtype)}
                elif name not in plan.names:
                    yield _on_cpu(plan.quantized(name).stored(name))
                else:
                    finished = self._journal.read(name) or self._finish(name)
                    self._keep(name, finished)
                    yield dict(finished.tensors)
                advance(1, name)

    def beside_bytes(self) -> int:
        """Return the size of the LoRA that stays beside the result."""
        return sum(_factor_bytes(update, self.beside_dtype) for update in self.beside.values())

    def _added(self, name: str) -> Tensor:
        """Return a tensor that stays in 16 bits, such as an output layer, with its delta."""
        tensor = self._plan.checkpoint.load(name)
        before, delta = tensor.float().to(self._plan.device), self._plan.delta(name, self._plan.update(name))
        found = self._narrowed(name, before + delta, tensor.dtype)
        module = _rounded("merge-16", delta, found.float() - before, None)
        self._tell(
            name, replace(module, size=found.nbytes, compared=dict.fromkeys(_ALL, (module.fidelity, found.nbytes)))
        )
        return found.cpu()

    def _keep(self, name: str, finished: Finished) -> None:
        plan, bias = self._plan, self._plan.bias_of(name)
        self._tell(name, finished.module)
        if finished.is_whole:
            self.whole.append(plan.paths.get(name, name.removesuffix(".weight")))
        if finished.shift is not None and bias is not None:
            self._shifts[bias] = finished.shift
        if finished.beside is not None:
            self.beside[plan.names[name]] = finished.beside
            self.beside_dtype = finished.beside_dtype

    def _narrowed(self, name: str, found: Tensor, dtype: torch.dtype) -> Tensor:
        result = found.to(self._plan.dtype_of(name, dtype))
        if result.is_floating_point() and not torch.isfinite(result).all() and torch.isfinite(found).all():
            raise OutputError(f"'{name}' must be finite in {result.dtype}, and overflows it. Choose a wider --dtype.")
        return result

    def _finish(self, name: str) -> Finished:
        plan, bias = self._plan, self._plan.bias_of(name)
        base, update = plan.quantized(name), plan.update(name)
        wanted = Wanted(
            base=base,
            delta=update.dense().float().to(plan.device),
            known=self._known(name),
            settle=None if bias is None else partial(self._settle, bias),
            seed=plan.settings.seed + zlib.crc32(name.encode()),
            rank=update.rank if isinstance(update, LowRank) else None,
            least=plan.settings.keep_at_least,
            most=plan.settings.error_at_most,
        )
        whole = wanted.base.weight() + wanted.delta
        kept = self._narrowed(name, whole, base.dtype)
        in_16 = _rounded("dequant-16", wanted.delta, kept.float() - base.weight(), self._held(name))
        try:
            strategy, baked = self._baked(wanted)
            compared = self._compared(name, wanted, in_16, kept)
        except ValueError as error:
            raise PlanError(
                f"module '{plan.names[name]}': {error}. Give more or other texts with --calibration, or another "
                "--strategy."
            ) from error
        if baked is None:
            module = replace(in_16, strategy=strategy, size=kept.nbytes, compared=compared)
            stored = kept.T.contiguous() if name in plan.turned else kept
            finished = Finished(tensors=_on_cpu({name: stored}), module=module, is_whole=True)
        else:
            baked = _storable(baked, kept.dtype)
            rows = self._held(name)
            tensors = _on_cpu(baked.weight.stored(name))
            module = BakedModule(
                strategy=strategy,
                fidelity=wanted.measured(baked, rows),
                on_texts=rows is not None,
                size=_size(name, baked, kept.dtype),
                rank=None if baked.beside is None else baked.beside.rank,
                compared=compared,
            )
            finished = Finished(
                tensors=tensors, module=module, shift=baked.shift, beside=baked.beside, beside_dtype=kept.dtype
            )
        self._journal.write(name, finished)
        return finished

    def _compared(self, name: str, wanted: Wanted, in_16: BakedModule, kept: Tensor) -> dict[str, tuple[Fidelity, int]]:
        """Return what other strategies leave of the module, and the bytes it takes."""
        found = {"dequant-16": (in_16.fidelity, kept.nbytes)}
        has_texts = wanted.known is not None and wanted.known.is_enough
        for title in (COMPARED if has_texts else COMPARED[:1]) if self._compares else ():
            baked = _storable(wanted.by(title), kept.dtype)
            found[title] = (wanted.measured(baked, self._held(name)), _size(name, baked, kept.dtype))
        return found

    def _settle(self, bias: str, shift: Tensor) -> Tensor:
        """Return what will have been added to a bias, as it is stored."""
        before = self._plan.checkpoint.load(bias)
        wide = before.float().to(shift.device)
        return (wide + shift).to(self._plan.dtype_of(bias, before.dtype)).float() - wide

    def _baked(self, wanted: Wanted) -> tuple[str, Baked | None]:
        """Return what a strategy gives; with `auto` the one of least error of those that keep enough, if any does."""
        asked = self._plan.strategy
        chosen = wanted.automatic() if asked == "auto" else asked
        return ("dequant-16", None) if chosen is None else (chosen, wanted.by(chosen))

    def _held(self, name: str) -> Rows | None:
        """Return the rows to measure a module on, if texts reached it."""
        known = self._known(name)
        return known.held if known is not None and known.is_enough else None

    def _tell(self, name: str, module: BakedModule) -> None:
        self.modules[self._plan.names[name]] = module


def _rounded(strategy: str, delta: Tensor, realised: Tensor, rows: Rows | None) -> BakedModule:
    """Return what rounding to 16 bits leaves of a delta, or of some rows of it."""
    return BakedModule(strategy=strategy, fidelity=on_rows(delta, realised, rows), on_texts=rows is not None)


def _storable(baked: Baked, dtype: torch.dtype) -> Baked:
    """Round a LoRA to what it is stored in."""
    beside = baked.beside
    if beside is None:
        return baked
    return replace(baked, beside=LowRank(b=beside.b.to(dtype).float(), a=(beside.scale * beside.a).to(dtype).float()))


def _factor_bytes(update: LowRank | None, dtype: torch.dtype) -> int:
    """Return the bytes of a LoRA's factors, none of no LoRA."""
    return 0 if update is None else update.rank * sum(update.shape) * dtype.itemsize


def _size(name: str, baked: Baked, dtype: torch.dtype) -> int:
    """Return the bytes of a module, its LoRA included."""
    return bytes_of(baked.weight.stored(name)) + _factor_bytes(baked.beside, dtype)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
