"""Results of the training commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..tasks.data.report import RowsReport

LogEntry = dict[str, Any]
"""Log entry of a step or of an evaluation: numbers by name, and in joint training the `objectives` of a step."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrainReport(ResultView):
    """Result of a training run.

    Args:
        out: The adapter's folder.
        steps: Planned optimizer steps.
        parameters: Trainable parameters; after a dry run without those of a head.
        history: One entry per step (loss, rows, tokens, seconds) and per evaluation on dev data.
        rows: After a dry run: counts of the training rows.
        pairs: After a dry run: counts of the pairs, if both are trained on.
        kept: Step whose factors were kept, if the dev loss chose one.
    """

    out: Path
    steps: int
    parameters: int
    history: list[LogEntry]
    rows: RowsReport | None = None
    pairs: RowsReport | None = None
    kept: int | None = None

    def _losses(self, steps: list[LogEntry]) -> JsonObject:
        """Return first and last loss, and those of each objective of joint training."""
        names = dict.fromkeys(name for entry in steps for name in entry.get("objectives", {}))
        losses = {name: [e["objectives"][name]["loss"] for e in steps if name in e["objectives"]] for name in names}
        total = {"loss": {"first": steps[0]["loss"], "last": steps[-1]["loss"]}}
        parts = {name: {"first": values[0], "last": values[-1]} for name, values in losses.items()}
        return total | ({"objectives": parts} if parts else {})

    def _dev(self) -> JsonObject:
        """Return first, last and best value of everything that was measured on dev data."""
        entries = [entry for entry in self.history if "seconds" not in entry]
        names = dict.fromkeys(name for entry in entries for name in entry if name != "step")
        values = {name: [entry[name] for entry in entries if name in entry] for name in names}
        dev = {
            name: {"first": v[0], "last": v[-1], "best": max(v) if name.endswith("accuracy") else min(v)}
            for name, v in values.items()
        }
        return {"dev": dev} if dev else {}

    def document(self) -> dict[str, Any]:
        """Return the JSON document of the training commands."""
        steps = [entry for entry in self.history if "seconds" in entry]
        if not steps:
            rows = self.rows.document() if self.rows else None
            pairs = {} if self.pairs is None else {"pairs": self.pairs.total, "pair_rows": self.pairs.document()}
            plan = {"out": str(self.out), "steps": self.steps, "lora_parameters": self.parameters, "dry_run": True}
            return plan | {"rows": rows} | pairs
        seconds = sum(entry["seconds"] for entry in steps)
        return {
            "out": str(self.out),
            "steps": len(steps),
            "steps_planned": self.steps,
            "kept_step": self.kept or len(steps),
            "parameters": self.parameters,
            **self._losses(steps),
            **self._dev(),
            "seconds_per_step": seconds / len(steps),
            "tokens_per_second": sum(entry["tokens"] for entry in steps) / seconds,
        }


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FitReport(TrainReport):
    """Result of an alignment in closed form, which takes no steps.

    Args:
        rows: Counts of the pairs.
        fit: "least-squares" or "mean-shift".
        layer: Number of the block whose states are aligned.
        objective: The manifest's entry on the fit and on how much it explains; None after a dry run.
        seconds: Seconds it took, without loading the model.
    """

    rows: RowsReport
    fit: str
    layer: int
    objective: dict[str, Any] | None = None
    seconds: float = 0.0
    steps: int = 0
    parameters: int = 0
    history: list[LogEntry] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return the JSON document of the command."""
        plan = {"out": str(self.out), "fit": self.fit, "layer": self.layer}
        if self.objective is None:
            return plan | {"dry_run": True, "rows": self.rows.document()}
        return plan | {"parameters": self.parameters, "seconds": self.seconds} | self.objective
