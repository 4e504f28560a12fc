"""When a candidate is stopped: its training is held against that of earlier ones by looks at dev data.

The median rule: training ends at a look if its best so far is behind the median of what earlier trainings had reached
at the same step, but not at its first look, nor while fewer than four have come so far. A training that was stopped
counts up to where it was. Compared are trainings whose looks measure the same thing in the same way: the share of dev
pairs that find each other among those of a batch, which no temperature changes, or the loss of the dev rows of a task;
of one layer, batch size, length of training, and so on (`Role.DEV_CURVE`). Others leave each other alone.

Reference: Golovin et al., Google Vizier, KDD 2017, section 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..commands.recipes import Step
from ..errors import ConfigError
from ..options.roles import Role, marked
from ..progress import Advance, Look, Watcher
from .plan import Planned
from .report import Pruned

EARLIER, WARM_UP = 4, 1
"""Trainings that must have come as far, and looks that stop nothing."""
"""Settings that decide what a look measures, and what had been done by its step."""

Report = Callable[[int, float], None]
"""Is told how a candidate stands, step by step; of more is better."""


def unheard(step: int, value: float) -> None:
    """Tell nobody."""


class Stopped(Exception):  # noqa: N818  (it is no error)
    """Training is behind.

    Args:
        pruned: Where, and by how much.
    """

    def __init__(self, pruned: Pruned) -> None:
        super().__init__(pruned.sentence())
        self.pruned = pruned


@dataclass(slots=True)
class Curve:
    """The looks of one training.

    Args:
        like: What it shares with those that it can be compared with.
        measure: What was measured.
        higher: Whether more is better.
        looks: Step and value of each.
    """

    like: str
    measure: str = ""
    higher: bool = False
    looks: list[tuple[int, float]] = field(default_factory=list)

    def add(self, look: Look) -> None:
        """Take a look in."""
        self.measure, self.higher = look.measure, look.higher
        self.looks.append((look.step, look.value))

    def best(self, step: int) -> float | None:
        """Return the best value up to a look; None without one at this step."""
        values = [value for at, value in self.looks if at <= step]
        there = any(at == step for at, _ in self.looks)
        return (max if self.higher else min)(values) if there else None

    def is_comparable(self, other: Curve) -> bool:
        """Whether both measure the same thing in the same way."""
        return (self.like, self.measure) == (other.like, other.measure)

    def tell(self, report: Report) -> None:
        """Report all looks."""
        for step, value in self.looks:
            report(step, value if self.higher else -value)

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class Listener:
    """A watcher that hears the looks of one training and ends it where it is behind.

    Args:
        watch: Receives everything else.
        command: What trains.
        curve: Takes the looks.
        others: Earlier trainings; none if nothing is to be stopped.
        report: Is told of each look.
    """

    def __init__(self, watch: Watcher, command: str, curve: Curve, others: Sequence[Curve], report: Report) -> None:
        self._watch, self._command, self._curve, self._report = watch, command, curve, report
        self._others = others

    def track(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a bar."""
        return self._watch.track(label, total)

    def note(self, message: str) -> None:
        """Show a line."""
        self._watch.note(message)

    def look(self, look: Look) -> None:
        """Take a look in.

        Raises:
            Stopped: the training is behind.
        """
        self._curve.add(look)
        self._report(look.step, look.value if look.higher else -look.value)
        self._watch.look(look)
        bests = [curve.best(look.step) for curve in self._others if curve.is_comparable(self._curve)]
        earlier, own = [best for best in bests if best is not None], self._curve.best(look.step)
        if own is None or len(earlier) < EARLIER or len(self._curve.looks) <= WARM_UP:
            return
        middle = median(earlier)
        if own < middle if look.higher else own > middle:
            raise Stopped(Pruned(command=self._command, step=look.step, measure=look.measure, value=own, median=middle))


def looks_at_dev(step: Step) -> bool:
    """Return whether a step is training that looks at dev data."""
    has_dev = any(getattr(step.settings, name, None) for name in ("dev", "dev_pairs"))
    return step.command.startswith("train-") and has_dev


def check_looks(recipe: Path, planned: Iterable[Planned]) -> str | None:
    """Check that some training can be stopped; return what a person should know of who is compared with whom.

    Raises:
        ConfigError: no training looks at dev data.
    """
    found: dict[str, set[str]] = {}
    for _, folder, steps in planned:
        for step in filter(looks_at_dev, steps):
            for name, value in step.settings.model_dump(
                mode="json", include=marked(step.settings, Role.DEV_CURVE)
            ).items():
                text = json.dumps(value).replace(json.dumps(str(folder))[1:-1], "")
                found.setdefault(f"{step.command}.{name}", set()).add(text)
    if not found:
        raise ConfigError(
            f"{recipe}: --prune needs a training step that looks at dev data, and none does. Give train-align "
            "dev_pairs or train-task dev, or drop --prune."
        )
    apart = sorted(name for name, values in found.items() if len(values) > 1)
    if not apart:
        return None
    return f"--prune compares training of equal {', '.join(apart)} only: looks at others measure something else."
