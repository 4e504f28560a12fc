"""`train-align`, `train-task`, `train-joint` and `train-fusion`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..options import AlignSettings, FusionSettings, JointSettings, TaskSettings
from .console import Console
from .options import settings_command

if TYPE_CHECKING:
    from ..training.report import FitReport, TrainReport


def _show(report: TrainReport, console: Console, unit: str = "rows", *, objective: str = "") -> None:
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
        told = ", ".join(
            f"{name} loss {found['first']:.3f} -> {found['last']:.3f}".strip() for name, found in losses.items()
        )
        console.say(
            f"trained {document['parameters']:,} parameters in {document['steps']} steps{objective}, "
            f"{document['seconds_per_step']:.2f} s per step ({document['tokens_per_second']:.0f} tokens/s): {told}"
        )
        for name, found in document.get("dev", {}).items():
            console.say(
                f"{name.replace('_', ' ')} {found['first']:.3f} -> {found['last']:.3f}, best {found['best']:.3f}"
                f"{'' if report.kept else '; the last step is kept (--patience keeps the best)'}"
            )
        if report.kept:
            early = "" if document["steps"] == report.steps else f" (stopped early, of {report.steps})"
            console.say(f"kept step {report.kept} of {document['steps']}{early}: the least dev loss")
        console.say(f"wrote {report.out}")
    console.document(document)


def _show_fit(report: FitReport, console: Console) -> None:
    document = report.document()
    if report.objective is None:
        console.say(f"would fit a LoRA of one layer ({report.fit}, block {report.layer}) and write {report.out}")
        for note in report.rows.warnings("pairs"):
            console.say(f"  {note}")
    else:
        found, held_out = report.objective, report.objective["held_out"]
        console.say(
            f"fitted {report.parameters:,} parameters in {report.seconds:.1f} s: {report.fit}, rank "
            f"{found['layer_update']['rank']}, on {found['module']} (block {report.layer} of {found['layers']})"
        )
        if held_out:
            console.say(
                f"on {held_out['pairs']} held-out pairs: the map explains {held_out['map']:.0%} of the way from "
                f"sources to translations, the LoRA {held_out['adapter']:.0%}; the LoRA explains "
                f"{held_out['adapter_tokens']:.0%} of how the map moves tokens; translations, which should stay, "
                f"move by {held_out['targets_moved']:.1%} of that way"
            )
        else:
            console.say(
                "no pairs to measure on: how much the LoRA explains is unknown. Give more pairs, or --dev-pairs FILE "
                "that shares no sentence with them"
            )
        console.say(f"wrote {report.out}")
    console.document(document)


@settings_command(
    AlignSettings,
    name="train-align",
    text="Example: adaptermix train-align --base MODEL --pairs de-en.tsv tr-en.tsv --out align",
)
def train_align(settings: AlignSettings, console: Console) -> None:
    """Train an alignment LoRA."""
    from ..training import train_align as work
    from ..training.report import FitReport

    report = work(settings, watch=console.watch)
    if isinstance(report, FitReport):
        _show_fit(report, console)
    else:
        _show(report, console, "pairs", objective=f" ({settings.objective})")


@settings_command(
    TaskSettings,
    name="train-task",
    text="Example: adaptermix train-task --base MODEL --task slots --train en.train.tsv --out task",
)
def train_task(settings: TaskSettings, console: Console) -> None:
    """Train a task LoRA."""
    from ..training import train_task as work

    _show(work(settings, watch=console.watch), console)


@settings_command(
    JointSettings,
    name="train-joint",
    text="Example: adaptermix train-joint --base MODEL --task slots --train en.train.tsv --pairs de-en.tsv --out joint",
)
def train_joint(settings: JointSettings, console: Console) -> None:
    """Train one LoRA for a task and for alignment."""
    from ..training import train_joint as work

    _show(work(settings, watch=console.watch), console)


@settings_command(
    FusionSettings,
    name="train-fusion",
    text="Example: adaptermix train-fusion --base MODEL --task classify --train jv.csv --source en.csv --out fused",
)
def train_fusion(settings: FusionSettings, console: Console) -> None:
    """Train a LoRA that fuses each text with its source."""
    from ..training import train_fusion as work

    _show(work(settings, watch=console.watch), console)
