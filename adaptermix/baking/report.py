"""What a bake gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fidelity import Fidelity, over_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class BakedModule:
    """One module of an adapter in its base model.

    Args:
        strategy: How it was written.
        fidelity: What is left of the adapter there.
        on_texts: Whether that was measured on held-out texts; else on the weights.
    """

    strategy: str
    fidelity: Fidelity
    on_texts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeReport:
    """What a bake gave.

    Args:
        strategy: What was asked for.
        modules: By path, those that the adapter acts on.
        bytes: Size of all tensors of the result.
        least: Share of the effect that must be kept.
        out: The output folder.
    """

    strategy: str
    modules: Mapping[str, BakedModule]
    bytes: int
    least: float
    out: Path | None

    @property
    def measured_on(self) -> str:
        """Where most was measured: `held-out texts`, or `weights` where no text reached a module."""
        count = sum(module.on_texts for module in self.modules.values())
        return "held-out texts" if 2 * count > len(self.modules) else "weights"

    @property
    def is_enough(self) -> bool:
        """Whether as much is kept as must be; 0 asks for nothing."""
        return self.least == 0 or self.overall.kept >= self.least

    @property
    def overall(self) -> Fidelity:
        """Means over the modules."""
        return over_modules([module.fidelity for module in self.modules.values()])

    def counts(self) -> dict[str, int]:
        """Return how many modules were written in which way."""
        found: dict[str, int] = {}
        for module in self.modules.values():
            found[module.strategy] = found.get(module.strategy, 0) + 1
        return dict(sorted(found.items()))

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "strategy": self.strategy,
            "kept": self.overall.kept,
            "error": self.overall.error,
            "measured_on": self.measured_on,
            "enough": self.is_enough,
            "modules": {
                path: {"strategy": module.strategy, "on_texts": module.on_texts} | module.fidelity.document()
                for path, module in self.modules.items()
            },
            "bytes": self.bytes,
            "out": None if self.out is None else str(self.out),
        }
