"""Report of an export."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..io.json_types import JsonObject
from ..io.report_view import ResultView


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedModule:
    """One module of an export.

    Args:
        rank: Rank of the update; the file has the largest rank of all modules.
        norm: Frobenius norm of the adapter's delta.
        error: Frobenius norm of the difference between the delta that the engine computes and the adapter's delta, as
            a share of `norm`; None in a dry run.
    """

    rank: int
    norm: float
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExportReport(ResultView):
    """Result of an export.

    Args:
        out: The output folder.
        engine: Name of the engine.
        rank: Rank of all modules in the file.
        modules: Report per module path.
        commands: Settings or commands that serve the output.
        bytes: Size of the files that the engine reads; None in a dry run.
    """

    out: Path
    engine: str
    rank: int
    modules: Mapping[str, ExportedModule]
    commands: tuple[str, ...]
    bytes: int | None = None

    @property
    def error(self) -> float | None:
        """The largest error of a module; None in a dry run."""
        errors = [module.error for module in self.modules.values() if module.error is not None]
        return max(errors, default=None)

    def fidelity(self) -> JsonObject:
        """Return the numbers for the manifest; `residual` is the error over all modules."""
        norm = math.hypot(*(module.norm for module in self.modules.values()))
        lost = math.hypot(*(module.norm * (module.error or 0.0) for module in self.modules.values()))
        residual = lost / norm if norm else 0.0
        modules = {path: asdict(module) for path, module in self.modules.items()}
        return {"norm": norm, "residual": residual, "rounding": residual, "error": self.error, "modules": modules}

    def document(self) -> JsonObject:
        """Return the JSON document of the command."""
        return {
            "out": str(self.out),
            "engine": self.engine,
            "rank": self.rank,
            "bytes": self.bytes,
            "error": self.error,
            "commands": list(self.commands),
            "modules": {path: asdict(module) for path, module in self.modules.items()},
        }
