"""Show merges, extracted adapters, statistics, publications and the merge methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..merge_statistics import StatisticsReport
    from ..merging import MergeReport
    from ..merging.extract_report import ExtractReport
    from ..options import (
        ExportSettings,
        ExtractSettings,
        MergeSettings,
        MethodsSettings,
        PushSettings,
        StatisticsSettings,
    )
    from ..publish.export_report import ExportReport
    from ..publish.hub import PushReport


def show_merge(report: MergeReport, settings: MergeSettings, console: Console) -> None:
    """Show a merge of adapters or checkpoints."""
    from ..algebra import sign_conflict_by_chance
    from ..publish.output import megabytes, size_sentence

    weights = ", ".join(f"{weight:g}" for weight in report.weights)
    lost = "truncation and rounding" if report.rounding else "truncation"
    console.say(
        f"{'would merge' if settings.dry_run else 'merged'} {len(settings.adapters)} {_what(settings)}, "
        f"weights {weights}, "
        f"method {report.method}: {len(report.modules)} modules, norm {report.norm:.4g}, "
        f"lost to {lost} {report.residual:.2%}, sign conflicts {report.sign_conflict:.1%} "
        f"({sign_conflict_by_chance(sum(map(bool, report.weights))):.0%} is chance)"
    )
    if report.bytes is not None:
        console.say(megabytes(report.bytes) if report.rank is None else size_sentence(report.rank, report.bytes))
    for note in report.notes:
        console.note(note)
    _show_places(report, console)
    if not settings.dry_run:
        console.say(f"wrote {settings.out}")


def _what(settings: MergeSettings) -> str:
    from ..merging.request import is_checkpoint

    return "checkpoints" if is_checkpoint(settings.adapters[0]) else "adapters"


def _show_places(report: MergeReport, console: Console) -> None:
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


def show_extract(report: ExtractReport, settings: ExtractSettings, console: Console) -> None:
    """Show an adapter that was extracted from two checkpoints."""
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
    if not settings.dry_run:
        console.say(f"wrote {settings.out}")


def show_statistics(report: StatisticsReport, settings: StatisticsSettings, console: Console) -> None:
    """Show how much was measured."""
    from ..publish.output import megabytes

    for note in report.notes:
        console.note(note)
    what = "rows" if settings.task else "texts"
    console.say(
        f"{'would measure' if settings.dry_run else 'measured'} {len(report.modules)} modules on {report.rows} {what} "
        f"for method {report.method}: {megabytes(report.bytes)}"
    )
    if not settings.dry_run:
        console.say(f"wrote {settings.out}")


def show_export(report: ExportReport, settings: ExportSettings, console: Console) -> None:
    """Show an export, and how to serve it."""
    from ..publish.output import megabytes

    error = "" if report.error is None else f", the deltas differ by at most {report.error:.1e}"
    size = "" if report.bytes is None else f", {megabytes(report.bytes)}"
    console.say(
        f"{'would write' if settings.dry_run else 'wrote'} {settings.out} for {report.engine}: {len(report.modules)} "
        f"modules of rank {report.rank}{size}{error}"
    )
    for command in report.commands:
        console.say(f"  {command}")


def show_push(report: PushReport, settings: PushSettings, console: Console) -> None:
    """Show the files, and the card of a dry run."""
    if settings.dry_run:
        console.say(report.card)
    console.say(f"{'would push' if report.url is None else 'pushed'} {len(report.files)} files to {report.repo}:")
    console.table(["file", "bytes"], [[name, f"{size:,}"] for name, size in report.files])
    if report.url:
        console.say(report.url)


def list_methods(settings: MethodsSettings, console: Console) -> None:
    """List the methods."""
    from ..methods.listing import list_methods as entries_of

    entries = entries_of(settings.names)
    for entry in entries:
        options = ", ".join(
            key if value is ... else f"{key}={'none' if value is None else value}"
            for key, value in entry.options.items()
        )
        if settings.names:
            console.say(f"{entry.name}\n\n{entry.text}\n\nOptions (--set KEY=VALUE): {options or 'none'}\n")
        else:
            console.say(f"{entry.name}\n    {entry.summary}" + (f"\n    options: {options}" if options else ""))
    console.document({"methods": [entry.document() for entry in entries]})
