"""`extract`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..options import ExtractSettings
from .console import Console
from .options import settings_command

if TYPE_CHECKING:
    from ..merging.extract_report import ExtractReport


@settings_command(
    ExtractSettings,
    name="extract",
    text="Embeddings and heads are left out unless a glob names them; what is lost with them is shown.\n\n"
    "Example: adaptermix extract --base BASE --tuned TUNED --rank 64 --out adapter",
)
def extract(settings: ExtractSettings, console: Console) -> None:
    """Extract a LoRA."""
    from ..merging.extract_adapter import extract as work

    report = work(**settings.model_dump(), watch=console.watch)
    _show(report, console)
    if not settings.dry_run:
        console.say(f"wrote {settings.out}")
    console.document(report.document())


def _show(report: ExtractReport, console: Console) -> None:
    from ..publish.output import size_sentence

    ranks = sorted(module.rank for module in report.modules.values())
    console.say(
        f"{len(report.modules)} modules of rank {ranks[0]}"
        + (f" to {ranks[-1]}" if ranks[-1] != ranks[0] else "")
        + f", norm {report.norm:.4g}: {report.residual:.2%} of it lost to truncation, at most {report.excess:.2%} more "
        "than the least possible of a module"
    )
    if report.bytes is not None:
        console.say(size_sentence(ranks[-1], report.bytes))
    if report.left_out:
        most = max(report.left_out, key=lambda key: report.left_out[key])
        console.say(
            f"left out {len(report.left_out)} tensors that differ, {report.left_out_share:.2%} of the norm of the "
            f"whole difference, most of it in {most}"
        )
    for note in report.notes:
        console.note(note, "  ")
