"""`merge`."""

from __future__ import annotations

from typing import Any

from ..options import MergeSettings
from .console import Console
from .options import settings_command


@settings_command(
    MergeSettings,
    name="merge",
    text="Example: adaptermix merge task align --weights 0.9 --out merged   (0.9 of the first, 0.1 of the second)",
    hidden=("places",),
)
def merge(settings: MergeSettings, console: Console) -> None:
    """Merge adapters."""
    from ..algebra import sign_conflict_by_chance
    from ..publish.output import megabytes, size_sentence
    from ..weight_search import merge_learned

    report = merge_learned(settings, watch=console.watch)
    weights = ", ".join(f"{weight:g}" for weight in report.weights)
    lost = "truncation and rounding" if report.rounding else "truncation"
    console.say(
        f"{'would merge' if settings.dry_run else 'merged'} {len(settings.adapters)} {_what(settings)}, "
        f"weights {weights}, "
        f"method {report.method}: {len(report.modules)} modules, norm {report.norm:.4g}, "
        f"lost to {lost} {report.residual:.2%}, sign conflicts {report.sign_conflict:.1%} "
        f"({sign_conflict_by_chance(sum(map(bool, report.weights))):.0%} is chance)"
    )
    if report.rank is not None:
        console.say(size_sentence(report.rank, report.bytes))
    elif report.bytes is not None:
        console.say(megabytes(report.bytes))
    for note in getattr(report, "notes", ()):
        console.note(note)
    _show_places(report, console)
    if not settings.dry_run:
        console.say(f"wrote {settings.out}")
    console.document(report.document())


def _what(settings: MergeSettings) -> str:
    from ..merging.request import is_checkpoint

    return "checkpoints" if is_checkpoint(settings.adapters[0]) else "adapters"


def _show_places(report: Any, console: Console) -> None:
    """Show which weights hold where, if they are not the same everywhere."""
    counts: dict[tuple[float, ...], list[str]] = {}
    for path, module in report.modules.items():
        counts.setdefault(module.weights, []).append(path)
    if len(counts) < 2 or () in counts:
        return
    rows = [
        [" / ".join(f"{weight:g}" for weight in weights), str(len(paths)), paths[0]]
        for weights, paths in sorted(counts.items(), key=lambda item: -len(item[1]))
    ]
    console.table(["weights", "modules", "such as"], rows[:12])
    if len(rows) > 12:
        console.say(f"  and {len(rows) - 12} more; --json lists every module")
