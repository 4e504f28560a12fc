"""Report of an extraction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..io.json_types import JsonObject
from ..io.report_view import ResultView


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedModule:
    """Fidelity of one module.

    Args:
        rank: Rank of the update.
        norm: Frobenius norm of the difference between the two weights.
        residual: Share of that norm that the stored factors lose, measured.
        excess: Bound on how far the truncation's residual lies above the least possible of this rank, as a share of
            that (of 1e-3 where it is smaller).
    """

    rank: int
    norm: float
    residual: float
    excess: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExtractReport(ResultView):
    """Result of an extraction.

    Args:
        out: The output folder.
        rank: The requested rank.
        modules: Report per module path.
        left_out: Norm of the difference per tensor that differs and is not in the adapter.
        notes: Remarks for the user.
        bytes: Size of the weights file.
    """

    out: Path
    rank: int | Literal["auto"]
    modules: Mapping[str, ExtractedModule]
    left_out: Mapping[str, float]
    notes: tuple[str, ...] = ()
    bytes: int | None = None

    @property
    def norm(self) -> float:
        """Frobenius norm of the difference over the modules of the adapter."""
        return math.hypot(*(module.norm for module in self.modules.values()))

    @property
    def residual(self) -> float:
        """Share of that norm that is lost."""
        lost = math.hypot(*(module.norm * module.residual for module in self.modules.values()))
        return lost / self.norm if self.norm > 0 else 0.0

    @property
    def excess(self) -> float:
        """Largest excess of a module."""
        return max((module.excess for module in self.modules.values()), default=0.0)

    @property
    def left_out_share(self) -> float:
        """Share of the norm of the whole difference, over all tensors, that is lost with those left out."""
        lost = math.hypot(*self.left_out.values())
        return lost / math.hypot(lost, self.norm) if lost > 0 else 0.0

    def fidelity(self) -> JsonObject:
        """Return the numbers as plain data, for manifests."""
        return {
            "norm": self.norm,
            "residual": self.residual,
            "excess": self.excess,
            "bytes": self.bytes,
            "modules": {path: asdict(module) for path, module in self.modules.items()},
            "left_out": dict(self.left_out),
            "left_out_share": self.left_out_share,
        }

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix extract`."""
        return {"out": str(self.out), "rank": self.rank, **self.fidelity(), "notes": list(self.notes)}
