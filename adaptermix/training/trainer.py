"""The training loop, for any objective."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..options import TrainingSettings
from ..progress import SILENT, Watcher
from .callbacks import Callbacks
from .checkpoint import Checkpoint, Workplace
from .lora import factors, is_head
from .norm_budget import NormBudget
from .parallel import ALONE, Processes
from .report import LogEntry


class BatchLoss(NamedTuple):
    """Result of a batch.

    Args:
        loss: To be differentiated.
        tokens: Tokens of the batch, without padding.
        parts: Loss and rows of each objective, if there are several.
        rows: Rows of the whole batch that were used, of all processes and objectives, where it is not `batch_size`.
        terms: How many terms the loss is a mean over; None for a mean over the rows.
        hits: How many pairs find each other, in an evaluation.
        means: Where the loss is a sum of two means over unlike terms: each mean with its number of terms.
    """

    loss: Tensor
    tokens: int
    parts: Mapping[str, tuple[Tensor, int]] = {}
    terms: int | None = None
    rows: int | None = None
    hits: float | None = None
    means: tuple[tuple[Tensor, float], ...] = ()


Loss = Callable[[int], tuple[Tensor, int] | BatchLoss]
"""From the number of a batch to its part of the loss: the parts of the batches of an optimizer step add up to it.

A mean of the batches' means would give a batch with few answer tokens the weight of one with many.
"""


Together = Callable[[int], Sequence[int]]
"""From the number of a batch to the numbers of all batches of its optimizer step."""


def in_a_row(accumulate: int) -> Together:
    """Return a function from a batch number to the batches of its step, if each step takes the next `accumulate`.

    Example:
        >>> in_a_row(4)(6)
        range(4, 8)
    """
    return lambda number: range(number // accumulate * accumulate, (number // accumulate + 1) * accumulate)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the step was finished and its checkpoint written."""


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that a step is finished first; a second signal stops at once."""
    caught: list[int] = []

    def remember(number: int, _frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's business
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:  # the signal arrived while the last step was being saved; pass it on to the caller
        os.kill(os.getpid(), caught[0])


class _Parts:
    """Loss and rows of each objective over the batches of a step, whose parts add up."""

    def __init__(self) -> None:
        self._losses: dict[str, list[tuple[float, int]]] = {}

    def add(self, batch: BatchLoss) -> None:
        for name, (loss, rows) in batch.parts.items():
            self._losses.setdefault(name, []).append((float(loss.detach()), rows))

    def entry(self, processes: Processes) -> LogEntry:
        losses = [sum(loss for loss, _ in entries) for entries in self._losses.values()]
        objectives = {
            name: {"loss": loss, "rows": sum(rows for _, rows in entries)}
            for (name, entries), loss in zip(self._losses.items(), processes.total(*losses), strict=True)
        }
        return {"objectives": objectives} if objectives else {}


def _groups(masters: Mapping[str, Tensor], settings: TrainingSettings) -> list[dict[str, Any]]:
    """Return the optimizer's groups, one per learning rate.

    LoRA+ has another learning rate for B (Hayou et al., 2024, section 4), and a head may have another.
    """
    rate = settings.learning_rate
    of_head = getattr(settings, "head_learning_rate", None) or rate
    groups: dict[float, list[Tensor]] = {}
    for name, master in masters.items():
        group = of_head if is_head(name) else rate * settings.lora_plus if "lora_B" in name else rate
        groups.setdefault(group, []).append(master)
    return [{"params": params, "lr": rate} for rate, params in groups.items()]


class Trainer:
    """AdamW on the LoRA factors, with float32 masters and checkpoints.

    The factors on the model may be half precision; their masters and moments are float32, so small late updates are not
    rounded away. Every batch has its own seed for dropout, so a resumed run repeats an unbroken one. Several processes
    each compute the loss of a share of a batch; gradients are summed before they are clipped.

    Args:
        model: The model with its LoRA.
        settings: The run's settings.
        steps: Optimizer steps in all.
        workplace: Where checkpoints go.
        watch: Receives progress.
        processes: Those that share the run.
        callbacks: See `Callbacks`.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings,
        *,
        steps: int,
        workplace: Workplace,
        watch: Watcher = SILENT,
        processes: Processes = ALONE,
        callbacks: Sequence[object] = (),
    ) -> None:
        from transformers import get_scheduler

        self._settings, self.steps = settings, steps
        self._workplace, self._watch, self._processes = workplace, watch, processes
        self._live = factors(model)
        self.masters = {name: p.detach().clone().float() for name, p in self._live.items()}
        self._budget = NormBudget(model, settings)
        self._optimizer = torch.optim.AdamW(_groups(self.masters, settings), weight_decay=settings.weight_decay)
        warmup = min(math.ceil(settings.warmup * steps), steps - 1)
        self._scheduler = get_scheduler(
            # transformers' own "constant" has no warm-up
            "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
            self._optimizer,
            warmup,
            num_training_steps=steps,
            # without a warm-up transformers would fall back to a time scale of 10,000 steps, hardly a decay at all
            scheduler_specific_kwargs={"timescale": max(1, warmup)} if settings.schedule == "inverse_sqrt" else None,
        )
        self.best: dict[str, Tensor] = {}
        self._measured: dict[str, float] = {}
        objects = {"model": model, "optimizer": self._optimizer, "lr_scheduler": self._scheduler}
        self._callbacks = Callbacks(callbacks, settings, steps=steps, processes=processes, **objects)

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return int(self._callbacks.state.global_step)

    @property
    def history(self) -> list[LogEntry]:
        """Log entries of steps and evaluations."""
        return self._callbacks.state.log_history  # type: ignore[no-any-return]

    @property
    def looks(self) -> list[int]:
        """Steps after which dev data were measured."""
        return [entry["step"] for entry in self.history if "seconds" not in entry]

    @property
    def kept(self) -> int | None:
        """Step whose factors are kept, if the dev loss chose one."""
        return self._callbacks.state.best_global_step if self.best else None

    def start_at(self, values: Mapping[str, Tensor]) -> None:
        """Start from these tensors, by the names of the parameters; others do not change."""
        for name, value in values.items():
            self.masters[name].copy_(value)
        self._publish()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint."""
        self._callbacks.state.global_step = checkpoint.step
        self._callbacks.state.log_history = list(checkpoint.history)
        for name, master in self.masters.items():
            master.copy_(checkpoint.tensors[name])
            if f"{name}/step" not in checkpoint.tensors:  # the loss does not reach it
                continue
            self._optimizer.state[master] = {
                key: checkpoint.tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
            for key in ("exp_avg", "exp_avg_sq"):
                self._optimizer.state[master][key] = self._optimizer.state[master][key].to(master.device)
            if f"best/{name}" in checkpoint.tensors:
                self.best[name] = checkpoint.tensors[f"best/{name}"].to(master.device)
        self._publish()
        # the schedule is a function of the step alone
        self._scheduler.last_epoch = self.done
        for group, base, scale in zip(
            self._optimizer.param_groups, self._scheduler.base_lrs, self._scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * scale(self.done)

    def _publish(self) -> None:
        with torch.no_grad():
            for name, parameter in self._live.items():
                parameter.copy_(self.masters[name])

    def keep_best(self) -> None:
        """Store the current factors; `finish` restores them."""
        self.best = {name: master.detach().clone() for name, master in self.masters.items()}

    def finish(self) -> None:
        """Restore the stored factors, if any."""
        for name, value in self.best.items():
            self.masters[name].copy_(value)
        self._publish()

    def _save(self) -> None:
        if not self._processes.main:
            return
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            tensors[name] = master
            tensors |= {f"{name}/{key}": value for key, value in self._optimizer.state[master].items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        self._workplace.save(Checkpoint(step=self.done, tensors=tensors, history=self.history))

    def _step(self, loss_of: Loss) -> LogEntry:
        """Take one optimizer step; return its log entry: its loss, tokens, objectives and rows."""
        total, tokens, rows, parts = 0.0, 0.0, 0, _Parts()
        for part in range(self._settings.accumulate):
            number = self.done * self._settings.accumulate + part
            torch.manual_seed(self._processes.seed(self._settings.seed, number))
            with self._processes.autocast():
                batch = BatchLoss(*loss_of(number))
            batch.loss.backward()  # type: ignore[no-untyped-call]
            total += float(batch.loss.detach())
            tokens += batch.tokens
            # Each process counts the whole batch, so the counts are not summed.
            rows += self._settings.batch_size if batch.rows is None else batch.rows
            parts.add(batch)
        for name, parameter in self._live.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        if self._processes.count > 1:  # other processes may have gradients that this one lacks
            for master in self.masters.values():
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        self._processes.add([master.grad for master in self.masters.values() if master.grad is not None])
        total, tokens = self._processes.total(total, tokens)
        length = float(torch.nn.utils.clip_grad_norm_(self.masters.values(), self._settings.max_grad_norm))
        self._check(loss=total, gradient=length)
        self._measured = {"learning_rate": self._optimizer.param_groups[0]["lr"], "grad_norm": length}
        self._optimizer.step()
        self._scheduler.step()
        scaled = self._budget.apply(self.masters)
        self._publish()
        self._callbacks.state.global_step += 1
        entry = {"step": self.done, "loss": total, "tokens": int(tokens)} | parts.entry(self._processes) | scaled
        return entry | {"rows": rows}

    def run(
        self,
        loss_of: Loss,
        *,
        label: str,
        unit: str = "rows",
        evaluate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Train to the last step, or until a callback stops.

        Args:
            loss_of: Loss of a batch by its number.
            label: Name of the progress bar.
            unit: What a row is called in it.
            evaluate: Measures dev data, when a callback asks for it.

        Raises:
            Interrupted: a signal came; the checkpoint of the last whole step is on disk.
        """
        devices = sorted({p.device.index for p in self._live.values() if p.device.type == "cuda"})
        call = self._callbacks
        with (
            torch.random.fork_rng(devices=devices),
            _stop_requests() as signals,
            self._watch.track(label, self.steps) as advance,
        ):
            advance(self.done, "")
            call("on_train_begin")
            self._share_stop()
            while self.done < self.steps and not call.control.should_training_stop:
                call.control.should_evaluate = call.control.should_save = False
                call("on_step_begin")
                start = time.perf_counter()
                entry = self._step(loss_of)
                seconds = time.perf_counter() - start
                self.history.append(entry | {"seconds": seconds})
                call("on_step_end")
                call("on_log", logs=self.history[-1] | self._measured)
                if evaluate and self._processes.any(call.control.should_evaluate):
                    self._evaluate(evaluate)
                advance(1, f"loss {entry['loss']:.3f}, {entry['rows'] / seconds:.1f} {unit}/s")
                self._save_if_due(bool(signals))
            call("on_train_end")

    def _evaluate(self, evaluate: Callable[[], dict[str, float]]) -> None:
        """Measure dev data, and keep the factors if a callback calls this step the best."""
        metrics = evaluate()
        self.history.append({"step": self.done, **metrics})
        if self._settings.keep_looks and self._processes.main:
            self._workplace.keep_look(self.done, self.masters)
        self._callbacks("on_evaluate", metrics=metrics)
        if self._processes.any(self._callbacks.state.best_global_step == self.done):
            self.keep_best()

    def _share_stop(self) -> None:
        """Stop all processes if a callback stops one, or the others would wait for it."""
        control = self._callbacks.control
        control.should_training_stop = self._processes.any(control.should_training_stop)

    def _save_if_due(self, interrupted: bool) -> None:
        """Write a checkpoint if it is time to, and stop after a signal; processes decide together."""
        control = self._callbacks.control
        flags = self._processes.total(interrupted, control.should_training_stop, control.should_save)
        stopped, control.should_training_stop, save = (count > 0 for count in flags)
        last = control.should_training_stop or self.done == self.steps
        if stopped or last or save or self.done % self._settings.checkpoint_every == 0:
            self._save()
            self._callbacks("on_save")
            self._share_stop()
        if stopped:
            self._processes.wait()  # a launcher ends all processes once one has ended
            raise Interrupted(f"stopped at step {self.done} of {self.steps}")

    def _check(self, **values: float) -> None:
        """Refuse a step that would spoil the factors; the last checkpoint is from before it."""
        from ..errors import AdapterMixError

        for name, value in values.items():
            if not math.isfinite(value):
                raise AdapterMixError(
                    f"the {name} must stay finite, and is {value} at step {self.done + 1}. "
                    f"Lower --learning-rate (now {self._settings.learning_rate:g}) or use --dtype float32.",
                    code="train.not-finite",
                )


def count_steps(rows: int, settings: TrainingSettings) -> int:
    """Return the optimizer steps for a number of rows: as set, or as many as the epochs need."""
    if settings.steps is not None:
        return settings.steps
    return max(1, math.ceil(settings.epochs * rows / (settings.batch_size * settings.accumulate)))
