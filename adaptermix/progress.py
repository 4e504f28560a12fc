"""Progress reports without printing: the caller passes a watcher. The command line passes one that draws bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Advance = Callable[[int, str], None]
"""Called with the number of finished units and a short text about them (a loss, a speed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A result on dev data during training, comparable between runs.

    Args:
        step: Optimizer steps done.
        measure: Name of the metric.
        value: Its value.
        higher: Whether higher is better.
    """

    step: int
    measure: str
    value: float
    higher: bool


class Watcher(Protocol):
    """Receives progress."""

    def track(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a bar of `total` units; call what it yields after each piece of work."""

    def note(self, message: str) -> None:
        """Show a one-line message."""

    def look(self, look: Look) -> None:
        """Receive a dev result. Raising an exception here stops training."""


class Silent:
    """A watcher that shows nothing."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:  # noqa: ARG002
        """Yield a function that does nothing."""
        yield lambda done, text: None  # noqa: ARG005

    def note(self, message: str) -> None:
        """Show nothing."""

    def look(self, look: Look) -> None:
        """Do nothing."""


SILENT: Watcher = Silent()
_RUN_PREFIX: ContextVar[str] = ContextVar("run_prefix", default="")


@contextmanager
def runs_named(prefix: str) -> Iterator[None]:
    """Let trackers show the runs of the block under names that start with `prefix`, in this thread."""
    token = _RUN_PREFIX.set(prefix)
    try:
        yield
    finally:
        _RUN_PREFIX.reset(token)


def run_name(out: Path) -> str:
    """Return the name under which a tracker shows the run that writes `out`."""
    return f"{_RUN_PREFIX.get()}{out.name}"
