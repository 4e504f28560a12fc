"""How long work reports what it is doing, without printing: the caller passes a watcher, the CLI's draws bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

Advance = Callable[[int, str], None]
"""Called with how many units were done and a short text about them (a loss, a speed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How training stands on dev data, in a number that can be compared with that of other runs.

    Args:
        step: Optimizer steps done.
        measure: What was measured.
        value: How much of it.
        higher: Whether more is better.
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
        """Show one line that a person should see."""

    def look(self, look: Look) -> None:
        """Be told how training stands on dev data; what it raises ends the training."""


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
