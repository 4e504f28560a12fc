"""`adaptermix report`: one self-contained HTML page on one output or several, with a table of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import OutputError
from ..io.files import write_whole
from ..io.markup import as_html
from ..options import ReportSettings
from ..options.paths import holds_output
from ..pictures import Picture
from ..pictures.charts import bars
from ..pictures.page import facts, page, table
from ..pictures.svg import SERIES
from ..progress import SILENT, Watcher
from .page_report import PageReport
from .report_entries import Entry, Scores, read_entries

_MOST = 100
"""Most entries on a page."""


@holds_output
def report(settings: ReportSettings, *, watch: Watcher = SILENT) -> PageReport:
    """Write an HTML page on outputs and documents.

    Raises:
        ConfigError: a folder does not exist, or has no output.
        OutputError: the file exists and `overwrite` is not set, or it cannot be written.
    """
    out = Path(settings.out)
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise OutputError(
            f"--out must be a file in a folder that exists, and {out} is not. Choose another name.",
            code="output.no-parent",
        )
    if out.exists() and not settings.overwrite:
        raise OutputError(
            f"{out} exists. Pass --overwrite to replace it, or choose another file.", code="output.file-exists"
        )
    written = write_page([Path(folder) for folder in settings.folders], out)
    if written.left_out:
        watch.note(f"the page shows {_MOST} outputs and leaves out {written.left_out}: name fewer folders.")
    return written


def write_page(paths: Sequence[Path], out: Path) -> PageReport:
    """Read outputs and documents, and write the page on them; an existing file is replaced.

    Args:
        paths: See `read_entries`.
        out: The file.

    Raises:
        ConfigError: a folder does not exist, or has no output.
    """
    every = read_entries(paths)
    entries = every[:_MOST]
    names = ", ".join(dict.fromkeys(path.resolve().name for path in paths))
    measures: dict[str, list[Scores]] = {}
    for scores in (scores for entry in entries for scores in entry.scores):
        measures.setdefault(scores.measure, []).append(scores)
    parts = [part for measure, systems in measures.items() for part in _scores(measure, _distinct(systems))]
    parts += [part for entry in entries for part in _entry(entry)]
    write_whole(out, page(f"Report of {names}", parts).encode())
    return PageReport(
        out=out,
        entries=[entry.name for entry in entries],
        scores={
            measure: {each.system: {name: point.value for name, point in each.points.items()} for each in systems}
            for measure, systems in measures.items()
        },
        left_out=len(every) - len(entries),
    )


def _distinct(systems: Sequence[Scores]) -> list[Scores]:
    """Return the systems without a repetition: several evaluations can compare with the same system."""
    kept: list[Scores] = []
    for system in systems:
        if not any(system.system == other.system and system.points == other.points for other in kept):
            kept.append(system)
    return kept


def _scores(measure: str, systems: Sequence[Scores]) -> list[str]:
    """Return the table of the scores of one measure, and their bars."""
    languages = list(dict.fromkeys(name for system in systems for name in system.points))
    rows: list[list[object]] = [
        [name, *(point.label if (point := system.points.get(name)) else "" for system in systems)] for name in languages
    ]
    if any(system.overall for system in systems):
        rows.append(["mean", *(system.overall.label if system.overall else "" for system in systems)])
    drawn = {system.system: system.points for system in systems[: len(SERIES)]}
    title = f"Scores: {measure}"
    chart = Picture(title=title, charts=[bars("scores, with 95 % intervals", drawn)])
    more = len(systems) - len(drawn)
    note = f'<p class="soft">The bars show the first {len(drawn)} of {len(systems)} systems.</p>' if more > 0 else ""
    cells = table(["language", *(system.system for system in systems)], rows)
    return [f"<h2>{as_html(title)}</h2>", note, f'<div class="row"><div>{cells}</div><div>{chart.svg}</div></div>']


def _entry(entry: Entry) -> list[str]:
    parts = [f"<h2>{as_html(entry.name)}</h2>", facts(entry.facts)]
    tables = [
        (title, titles, rows)
        for title, titles, rows in (
            ("Adapters", ["name", "weight", "made by"], entry.inputs),
            ("Data", ["file", "use", "rows", "languages"], entry.data),
        )
        if rows
    ]
    blocks = [f"<div><h3>{title}</h3>{table(titles, rows)}</div>" for title, titles, rows in tables]
    blocks += [f"<div>{picture.svg}</div>" for each in entry.pictures for picture in each.split()]
    return [*parts, f'<div class="row">{"".join(blocks)}</div>'] if blocks else parts
