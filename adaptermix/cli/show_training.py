"""Show the results of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..options import AlignSettings, TrainingSettings
    from ..training.report import FitReport, TrainReport


def show(
    report: TrainReport, _settings: TrainingSettings, console: Console, *, unit: str = "rows", objective: str = ""
) -> None:
    """Show the plan of a dry run, or the results of training."""
    document = report.document()
    if document.get("dry_run"):
        console.say(
            f"would train {report.steps} steps and write {report.out}, a LoRA of {report.parameters:,} parameters"
        )
        if report.rows:
            counts = ", ".join(f"{language} {count}" for language, count in report.rows.languages.items())
            pairs = "" if report.pairs is None else f"; {report.pairs.total} pairs"
            dev = f"; {report.rows.held_out} dev rows" if report.rows.held_out else ""
            console.say(f"  {unit}: {counts}; {report.rows.repeated} repeated{dev}{pairs}")
            for note in [*report.rows.warnings(unit), *(report.pairs.warnings("pairs") if report.pairs else [])]:
                console.say(f"  {note}")
    else:
        losses = document.get("objectives") or {"": document["loss"]}
        changes = ", ".join(
            f"{name} loss {values['first']:.3f} -> {values['last']:.3f}".strip() for name, values in losses.items()
        )
        console.say(
            f"trained {document['parameters']:,} parameters in {document['steps']} steps{objective}, "
            f"{document['seconds_per_step']:.2f} s per step ({document['tokens_per_second']:.0f} tokens/s): {changes}"
        )
        for name, values in document.get("dev", {}).items():
            console.say(
                f"{name.replace('_', ' ')} {values['first']:.3f} -> {values['last']:.3f}, best {values['best']:.3f}"
                f"{'' if report.kept else '; the last step is kept (--patience keeps the best)'}"
            )
        if report.kept:
            early = "" if document["steps"] == report.steps else f" (stopped early, of {report.steps})"
            console.say(f"kept step {report.kept} of {document['steps']}{early}: the least dev loss")
        console.say(f"wrote {report.out}")


def _show_fit(report: FitReport, console: Console) -> None:
    if report.objective is None:
        console.say(f"would fit a LoRA of one layer ({report.fit}, block {report.layer}) and write {report.out}")
        for note in report.rows.warnings("pairs"):
            console.say(f"  {note}")
    else:
        values, held_out = report.objective, report.objective["held_out"]
        console.say(
            f"fitted {report.parameters:,} parameters in {report.seconds:.1f} s: {report.fit}, rank "
            f"{values['layer_update']['rank']}, on {values['module']} (block {report.layer} of {values['layers']})"
        )
        if held_out:
            console.say(
                f"on {held_out['pairs']} held-out pairs: the map explains {held_out['map']:.0%} of the squared "
                f"distance from sources to translations, the LoRA {held_out['adapter']:.0%}; the LoRA explains "
                f"{held_out['adapter_tokens']:.0%} of the map's change of tokens; translations, which should not "
                f"change, move by {held_out['targets_moved']:.1%} of that distance"
            )
        else:
            console.say(
                "no pairs to measure on: how much the LoRA explains is unknown. Give more pairs, or --dev-pairs FILE "
                "that shares no sentence with them"
            )
        console.say(f"wrote {report.out}")


def show_align(report: TrainReport | FitReport, settings: AlignSettings, console: Console) -> None:
    """Show how an alignment was trained, or computed in closed form."""
    from ..training.report import FitReport

    if isinstance(report, FitReport):
        _show_fit(report, console)
    else:
        show(report, settings, console, unit="pairs", objective=f" ({settings.objective})")
