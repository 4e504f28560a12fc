"""`statistics`."""

from __future__ import annotations

from ..options import StatisticsSettings
from .console import Console
from .options import settings_command


@settings_command(
    StatisticsSettings,
    name="statistics",
    text="One file for each adapter, for `merge --method regmean` or `fisher`.\n\n"
    "Example: adaptermix statistics task --base MODEL --data texts.txt --out task.safetensors\n\n"
    "Example: adaptermix statistics task --base MODEL --task classify --data en.csv --method fisher --out "
    "task.safetensors",
    arguments={"adapter": "ADAPTER"},
)
def statistics(settings: StatisticsSettings, console: Console) -> None:
    """Measure statistics."""
    from ..merge_statistics import statistics as work
    from ..publish.output import megabytes

    report = work(settings, watch=console.watch)
    for note in report.notes:
        console.note(note)
    what = "rows" if settings.task else "texts"
    console.say(
        f"{'would measure' if settings.dry_run else 'measured'} {len(report.modules)} modules on {report.rows} {what} "
        f"for method {report.method}: {megabytes(report.bytes)}"
    )
    if not settings.dry_run:
        console.say(f"wrote {settings.out}")
    console.document(report.document())
