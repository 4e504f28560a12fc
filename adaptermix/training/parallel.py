"""Several processes on one run: each takes a share of every batch, and all take the same step.

Invariants: the step equals the step of the whole batch in one process; processes decide together; one of them writes
and prints; a process that fails, or is killed, ends all of them. The LoRA is small, so every process has all of it
without a wrapper, and the gradients are summed in one message per step. The base model is whole in every process too,
unless `sharding` splits it. Without a launcher this module imports no accelerate, and no number changes.
"""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count as counter
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from ..errors import AdapterMixError, PlanError, ReportedElsewhere
from ..io.json_types import JsonObject
from ..io.launcher import asks_for, is_launched, is_main_process, precision, process_count
from ..models.stack import stack_folder
from ..options import AlignSettings, JointSettings, LoadOptions, TrainingSettings
from ..options.paths import writing
from ..progress import SILENT, Watcher

if TYPE_CHECKING:
    from accelerate import Accelerator

S = TypeVar("S", bound=TrainingSettings)
T = TypeVar("T")

_RUNS = counter()
_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


class Processes:
    """The processes of a run, seen from one of them.

    Args:
        accelerator: Accelerate's view of them; none for a process that runs alone.
        sharded: Whether they hold the base model together, so that all must run it equally often.
    """

    def __init__(self, accelerator: Accelerator | None = None, *, sharded: bool = False) -> None:
        self._accelerator: Accelerator = accelerator
        self.sharded = sharded
        self.count: int = accelerator.num_processes if accelerator else 1
        self.rank: int = accelerator.process_index if accelerator else 0

    @property
    def main(self) -> bool:
        """Whether this one writes and prints for all."""
        return self.rank == 0

    def load_options(self, settings: TrainingSettings) -> LoadOptions:
        """Return the arguments of `load_base` in this process."""
        options = settings.load_options()
        if self._accelerator and (self.count > 1 or self._accelerator.device.type == "cpu"):
            options["device"] = str(self._accelerator.device)
        return options

    def entry(self) -> JsonObject:
        """Return everything besides the settings that decides the result; empty for a single process in one dtype."""
        shared: JsonObject = {"processes": self.count} if self.count > 1 else {}
        shared |= {"sharded": True} if self.sharded else {}  # other dropout draws
        return shared | ({"mixed_precision": precision()} if self._accelerator and precision() != "no" else {})

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of the losses: the launcher's mixed precision."""
        return self._accelerator.autocast() if self._accelerator else nullcontext()

    def seed(self, seed: int, number: int) -> int:
        """Return the seed of batch `number`'s dropout; every process draws its own."""
        plain = (seed << 32) + number
        return plain if self.main else random.Random(f"{plain}/{self.rank}").getrandbits(63)  # noqa: S311

    def shares(self, rows: Sequence[T]) -> list[Sequence[T]]:
        """Return the rows of each process, as equal in number and, in sorted batches, in length as can be.

        Fewer rows than processes are all taken by every process, and `part` makes it right.
        """
        if len(rows) < self.count:
            return [rows] * self.count
        return [rows[rank :: self.count] for rank in range(self.count)]

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """Return this process's rows of a batch."""
        return self.shares(rows)[self.rank]

    def turns(self, batches: Sequence[T]) -> Sequence[T]:
        """Return which batches this process measures, where their sums are added up over all processes."""
        return batches if self.sharded else batches[self.rank :: self.count]

    def part(self, terms: float, rows: Sequence[object], whole: float) -> float:
        """Return the weight of a mean over this process's share of a batch in the mean over an optimizer step.

        The weighted means of all batches and processes of a step add up to the mean over all terms of the step.

        Args:
            terms: How many terms (tokens, words, windows, rows) the mean over this process's share has.
            rows: The rows of the batch; fewer rows than processes are computed by every process.
            whole: How many terms the step has, each counted once.
        """
        copies = self.count if len(rows) < self.count else 1
        return terms / copies / (whole or 1)

    def gathers(self, rows: Sequence[int]) -> bool:
        """Return whether several processes have rows of a batch."""
        return 1 < self.count <= len(rows)

    def gather(self, vectors: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the vectors of all rows of a batch, process by process; a gradient reaches this process's own alone.

        Where every process computes the same loss of them, see `common`, the sum of the gradients is the whole one.

        Args:
            vectors: Vectors of this process's share.
            rows: Rows of the whole batch.

        Shapes: vectors [own width]; returns [rows width].
        """
        sizes = [len(share) for share in self.shares(rows)]
        padded = vectors.new_zeros(max(sizes), *vectors.shape[1:])
        padded[: len(vectors)] = vectors.detach()
        with _peers_alive():
            gathered = self._accelerator.gather(padded).view(self.count, *padded.shape)
        return torch.cat([vectors if n == self.rank else gathered[n, :size] for n, size in enumerate(sizes)])

    def common(self, loss: Tensor) -> Tensor:
        """Return this process's part of a loss that every process has computed whole from gathered vectors.

        Its value is a share; its gradient is not, since each process's covers its own rows only.
        """
        return loss if self.count == 1 else loss - loss.detach() * (1 - 1 / self.count)

    def total(self, *numbers: float) -> list[float]:
        """Return the sums of numbers over all processes, the same bits in each."""
        if self.count == 1:
            return list(numbers)
        local = torch.tensor(numbers, dtype=torch.float64, device=self._accelerator.device)
        with _peers_alive():
            return cast(list[float], self._accelerator.reduce(local, "sum").tolist())

    def any(self, flag: bool) -> bool:
        """Return whether it holds in some process."""
        return self.total(float(flag))[0] > 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes, in place and in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _peers_alive():
            flat = self._accelerator.reduce(flat, "sum")
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            with _peers_alive():
                self._accelerator.wait_for_everyone()

    def main_first(self, work: Callable[[], T]) -> T:
        """Let the main process do it, then all others."""
        if self.main:
            done = work()
            self.wait()
            return done
        self.wait()
        return work()

    def note(self) -> str | None:
        """Return a note on processes and precision."""
        entry = self.entry()
        mixed = f", mixed precision {entry['mixed_precision']}" if "mixed_precision" in entry else ""
        where = "CPU" if self._accelerator and self._accelerator.device.type == "cpu" else "a GPU each"
        shared = ", the base model in shares" if self.sharded else ""
        return (
            f"{self.count} processes on {where}{mixed}{shared}" if self.count > 1 else mixed.removeprefix(", ") or None
        )


ALONE = Processes()
"""A process without others."""


@contextmanager
def _peers_alive() -> Iterator[None]:
    """Turn the error of a missing process into one sentence."""
    try:
        yield
    except RuntimeError as error:  # torch's, of all its backends
        raise AdapterMixError(
            "a process of this run has ended early. "
            "Start all of them again with --resume to continue from the last checkpoint.",
            code="processes.ended",
        ) from error


def _fault(settings: TrainingSettings) -> str | None:
    """Return why the settings and the launcher do not fit each other, if so."""
    count = process_count()
    for name, engine in _OTHER_ENGINES.items():
        if asks_for(name):
            return (
                f"the launcher must not wrap the model, but it requests {engine}. Launch without it; --shard-base "
                "splits the base model over the processes, and --quantize nf4 makes it small."
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        return "the launcher asks for torch.compile; launch without it, and give --compile instead."
    if precision() not in ("no", "bf16"):
        return (
            f"mixed precision must be no or bf16, and the launcher asks for {precision()}, whose gradients would need "
            "scaling. Launch with --mixed_precision bf16."
        )
    return _fault_of_settings(settings, count)


def _fault_of_settings(settings: TrainingSettings, count: int) -> str | None:
    """Return which setting does not fit so many processes, if so."""
    if settings.shard_base and stack_folder(settings.base):
        return (
            f"--shard-base needs a single model, and {settings.base!r} is a stack, whose encoder every process holds "
            "whole. Drop --shard-base."
        )
    if settings.shard_base and (count == 1 or settings.quantize != "none" or settings.dora or settings.compile):
        return (
            f"--shard-base needs several processes, as torchrun or accelerate launch start them ({count} here), and a "
            "base model that is neither quantised nor compiled; DoRA needs it whole. Drop --shard-base or the other."
        )
    if count > 1 and settings.device.startswith("cuda:"):
        return f"--device must be auto, cpu or cuda where {count} processes take a GPU each, got {settings.device}."
    apart = isinstance(settings, AlignSettings | JointSettings) and not settings.gather_negatives
    least = 2 * count if apart else count
    if count > 1 and settings.batch_size < least:
        each = "a pair and its negative" if apart else "a row"
        return (
            f"--batch-size must be at least {least}, {each} for each of {count} processes, got {settings.batch_size}."
        )
    return None


def _join(settings: TrainingSettings) -> Processes:
    """Connect to the other processes.

    Raises:
        PlanError: the settings and the launcher do not fit each other.
        ReportedElsewhere: the same in a process that does not print.
    """
    fault = _fault(settings)
    if fault:
        raise (
            PlanError(fault, code="processes.settings")
            if is_main_process()
            else ReportedElsewhere(fault, code="processes.elsewhere")
        )
    from accelerate import Accelerator

    cpu = settings.device == "cpu" or not torch.cuda.is_available() or asks_for("ACCELERATE_USE_CPU")
    with _peers_alive():
        accelerator = Accelerator(cpu=cpu)
    atexit.unregister(_leave)
    atexit.register(_leave)
    return Processes(accelerator, sharded=settings.shard_base)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _first_to_report(key: str) -> bool:
    """Return whether no other process has failed before; the launcher's store, which outlives a process, records it."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return _get_default_store().add(key, 1) == 1
    except RuntimeError:  # gone with the process that kept it
        return True


def in_processes(work: Callable[[S, Watcher, Processes], T], settings: S, watch: Watcher) -> T:
    """Do work in all processes that a launcher has started, or in this one alone.

    Raises:
        ReportedElsewhere: the work failed here, and in another process before.
    """
    if not is_launched() and not settings.shard_base:
        with writing(settings):
            return work(settings, watch, ALONE)
    processes = _join(settings)
    key = f"adaptermix/told/{next(_RUNS)}"
    watch = watch if processes.main else SILENT
    if note := processes.note():
        watch.note(note)
    try:
        with writing(settings):  # only the main process locks
            return work(settings, watch, processes)
    except BaseException as error:
        if processes.count == 1 or _first_to_report(key):
            raise
        raise ReportedElsewhere(
            str(error), interrupted=isinstance(error, KeyboardInterrupt), code="processes.elsewhere"
        ) from error
