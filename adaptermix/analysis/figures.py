"""Heatmaps over layers and module kinds, without matplotlib's global state."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, PlanError
from ..io.files import write_whole
from .inspect_report import AdapterInspection, Inspection, PairInspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ADAPTERS = 8
"""More adapters would need more panels than a figure can show."""
_COLUMNS = 4
_DPI = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """One heatmap: a title, the value of a cell (None for an empty one), colours and their range."""

    title: str
    value: Callable[[Sequence[str]], float | None]
    colours: str
    low: float
    high: float | None


def check_plot(path: Path, *, count: int) -> None:
    """Refuse a plot that could not be written, before any work is done.

    Args:
        path: The file.
        count: Number of adapters.

    Raises:
        OutputError: no matplotlib, no .png, no such folder, or a folder of that name.
        PlanError: more than MOST_ADAPTERS adapters.
    """
    if count > MOST_ADAPTERS:
        raise PlanError(
            f"--plot draws at most {MOST_ADAPTERS} adapters, got {count}. Give fewer.", code="plot.too-many"
        )
    check_png(path)


def check_png(path: Path) -> None:
    """Refuse a picture that could not be written, before any work is done.

    Raises:
        OutputError: no matplotlib, no .png, no such folder, or a folder of that name.
    """
    if find_spec("matplotlib") is None:
        raise OutputError(
            "--plot needs matplotlib, which is not installed. Run: pip install 'matplotlib>=3.9'",
            code="plot.no-matplotlib",
        )
    if path.suffix.lower() != ".png":
        raise OutputError(f"--plot must be a PNG file, such as plot.png, got {str(path)!r}.", code="plot.not-png")
    check_file(path, "--plot")


def check_file(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before any work is done.

    Raises:
        OutputError: no such folder, or it is not writable, or a folder has the name of the file.
    """
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(
            f"{option} must lie in a folder that exists and can be written, and {path} does not.",
            code="output.no-parent",
        )
    if path.is_dir():
        raise OutputError(
            f"{option} must be a file, and {path} is a folder. Choose another name.", code="output.is-folder"
        )


def _value(key: str, of: AdapterInspection | PairInspection, paths: Sequence[str]) -> float | None:
    return (of.group(paths) or {}).get(key)


def _panels(result: Inspection) -> list[_Panel]:
    panels = [
        _Panel(
            title=f"{adapter.name}: norm", value=partial(_value, "norm", adapter), colours="viridis", low=0.0, high=None
        )
        for adapter in result.adapters
    ]
    for pair in result.pairs:
        for key, colours, low in (("cosine", "RdBu_r", -1.0), ("overlap", "magma", 0.0)):
            value = partial(_value, key, pair)
            title = f"{pair.a.name} | {pair.b.name}: {key}"
            panels.append(_Panel(title=title, value=value, colours=colours, low=low, high=1.0))
    return panels


def draw(result: Inspection, path: Path) -> None:
    """Write a PNG atomically: per adapter the norm, per pair cosine and overlap, layers by module kinds.

    Empty cells (no such module, a zero delta) are grey.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_file(path, "--plot")
    panels = _panels(result)
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 2.0 + 0.42 * len(result.kinds)
    height = min(9.0, 1.5 + 0.17 * len(result.layers))
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    panels_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(panels_axes, panels, strict=False):
        _draw_panel(figure, axes, panel, result)
    for axes in panels_axes[len(panels) :]:
        axes.set_axis_off()
    content = BytesIO()
    figure.savefig(content, dpi=_DPI, format="png", metadata={"Software": "adaptermix"})
    write_whole(path, content.getvalue())


def _draw_panel(figure: Figure, axes: Axes, panel: _Panel, result: Inspection) -> None:
    from matplotlib import colormaps

    kinds = {kind: set(paths) for kind, paths in result.kinds.items()}
    cells = [
        [panel.value([path for path in paths if path in members]) for members in kinds.values()]
        for paths in result.layers.values()
    ]
    numbers = [[math.nan if value is None else value for value in row] for row in cells]
    highest = max((value for row in cells for value in row if value is not None), default=0.0)
    image = axes.imshow(
        numbers,
        cmap=colormaps[panel.colours].with_extremes(bad="#dadce0"),
        vmin=panel.low,
        vmax=panel.high if panel.high is not None else highest or 1.0,
        aspect="auto",
        interpolation="nearest",
    )
    step = max(1, math.ceil(len(result.layers) / 32))
    axes.set_yticks(range(0, len(result.layers), step), list(result.layers)[::step], fontsize=7)
    axes.set_xticks(range(len(kinds)), list(kinds), rotation=60, ha="right", fontsize=7)
    axes.set_title(panel.title.replace("$", r"\$"), fontsize=9)  # Else matplotlib reads names as formulas.
    axes.set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes)
