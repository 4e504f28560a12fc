"""Report of a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..adapters import AdapterState
from ..io.json_types import JsonObject
from ..io.report_view import ResultView


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """Fidelity of one module.

    Args:
        rank: Rank of the result; None for a dense one.
        norm: Frobenius norm of the merged delta, before any truncation.
        residual: Share of that norm lost to truncation and to rounding to 16 bits.
        sign_conflict: Share of entries at which two weighted deltas pull in opposite directions.
        weights: Weight of each adapter in this module; 0 if the adapter lacks the module, is zero there, or is left out
            (a zero delta still counts in a mean). If only one adapter changes the module, the factor on its delta.
        excess: Upper bound on the residual relative to the least possible one of this rank, minus 1.
        rounding: Share of that norm lost to rounding alone.
    """

    rank: int | None
    norm: float
    residual: float
    sign_conflict: float
    weights: tuple[float, ...] = ()
    excess: float = 0.0
    rounding: float = 0.0

    def with_rounding(self, share: float) -> ModuleReport:
        """Return the report of a module that also loses this share of its norm to rounding."""
        return replace(self, residual=math.hypot(self.residual, share), rounding=share)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MergeReport(ResultView):
    """Result of a merge: output folder, settings, and fidelity per module.

    Args:
        out: The output folder, if one was to be written.
        method: Name of the method.
        weights: Weight per adapter.
        modules: Report per module path.
        plan: The resolved settings.
        notes: Remarks for the user.
        rank: Rank of the written adapter, which all modules have, or the largest one of a compact adapter; None if the
            output is not an adapter.
        bytes: Size of the weight files.
        adapter: The merged adapter, if no folder was given and the result is an adapter; see `adaptermix.add_to`.
    """

    out: Path | None
    method: str
    weights: tuple[float, ...]
    modules: Mapping[str, ModuleReport]
    plan: Mapping[str, object] | None = None
    notes: tuple[str, ...] = ()
    rank: int | None = None
    bytes: int | None = None
    adapter: AdapterState | None = None

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole merged delta."""
        return math.hypot(*(module.norm for module in self.modules.values()))

    @property
    def residual(self) -> float:
        """Share of the norm of the whole delta lost to truncation and to rounding to 16 bits."""
        return self._share("residual")

    @property
    def rounding(self) -> float:
        """Share of the norm of the whole delta lost to rounding alone."""
        return self._share("rounding")

    def _share(self, loss: str) -> float:
        lost = math.hypot(*(module.norm * getattr(module, loss) for module in self.modules.values()))
        return lost / self.norm if self.norm > 0 else 0.0

    @property
    def sign_conflict(self) -> float:
        """Mean share of sign conflicts over the modules that at least two adapters change; 0 without such a module."""
        shared = [m.sign_conflict for m in self.modules.values() if sum(weight != 0 for weight in m.weights) > 1]
        return sum(shared) / len(shared) if shared else 0.0

    @property
    def acting(self) -> tuple[bool, ...]:
        """Whether each adapter has a weight other than 0 in some module."""
        weights = [m.weights for m in self.modules.values() if len(m.weights) == len(self.weights)] or [self.weights]
        return tuple(any(column) for column in zip(*weights, strict=True))

    def fidelity(self) -> JsonObject:
        """Return the fidelity report as plain data, for manifests."""
        return {
            "norm": self.norm,
            "residual": self.residual,
            "rounding": self.rounding,
            "rank": self.rank,
            "bytes": self.bytes,
            "sign_conflict": self.sign_conflict,
            "modules": {module: asdict(report) for module, report in self.modules.items()},
        }

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix merge`."""
        return {
            "out": None if self.out is None else str(self.out),
            "method": self.method,
            "weights": list(self.weights),
            **({} if self.plan is None else {"plan": dict(self.plan)}),
            **({"notes": list(self.notes)} if self.notes else {}),
            **self.fidelity(),
        }
