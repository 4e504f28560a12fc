"""`spectrum`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..options import SpectrumSettings
from .console import Console
from .options import settings_command

if TYPE_CHECKING:
    from ..analysis import SpectrumReport


@settings_command(
    SpectrumSettings,
    name="spectrum",
    text="MODEL_A is the base. Cells are 'norm of the singular values of A -> of B (distance d)'. With an adapter as "
    "MODEL_B the base is compared with base and adapter together; two adapters are compared by their deltas.\n\n"
    "Singular values are computed in float64, by an SVD up to a shorter side of 1024, beyond that from the Gram "
    "matrix.\n\n"
    "Give the models before the options that take several values.\n\n"
    "Example: adaptermix spectrum BASE TUNED --layers 0-11 --modules q_proj k_proj --csv scaling.csv",
)
def spectrum(settings: SpectrumSettings, console: Console) -> None:
    """Compare two spectra."""
    from ..analysis import spectrum as work

    report = work(**settings.model_dump(), watch=console.watch)
    _show(report, console)
    if settings.csv:
        console.say(f"wrote {settings.csv}")
    console.document(report.document())


def _show(report: SpectrumReport, console: Console) -> None:
    console.say(
        f"Singular values of {report.a} (A) and {report.b} (B): {report.compared}, {len(report.modules)} modules"
    )
    rows = []
    for layer in report.layers:
        cells = [report.cell(layer, kind) for kind in report.kinds]
        rows.append(
            [
                layer,
                *(f"{c['norm_a']:.4g} -> {c['norm_b']:.4g} ({c['distance']:.3g})" if c else "-" for c in cells),
            ]
        )
    console.table(["layer", *report.kinds], rows)
    console.say("\nMeans over the layers")
    rows = []
    for kind, paths in report.kinds.items():
        numbers = report.together(paths) or {}
        means = [numbers[key] for key in ("mean_ratio", "mean_distance", "mean_relative_distance")]
        rows.append([kind, *("-" if value is None else f"{value:.4g}" for value in means)])
    console.table(["module", "ratio B/A", "d", "d / norm A"], rows)
    for note in report.notes:
        console.note(f"{note}.", "  ")
