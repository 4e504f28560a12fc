"""Figures of retrieval: a heatmap over layers and directions or over languages, and the mean per layer."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.files import write_whole
from .retrieval_report import Retrieval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MOST_DIRECTIONS = 60
"""With more directions, the heatmap has a row and a column per language instead of a row per direction."""


def draw(result: Retrieval, path: Path) -> None:
    """Write the figure, with the curve of the base model alone if it was measured."""
    from matplotlib.figure import Figure

    count = len(result.layers[0])
    by_language = count > MOST_DIRECTIONS
    rows = len(result.table()[0]) if by_language else count
    width, height = (
        (4 + 0.3 * rows, 4 + 0.3 * rows) if by_language else (6 + 0.22 * len(result.layers), 4 + 0.16 * rows)
    )
    figure = Figure(figsize=(width, height), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(max(2, (0.8 if by_language else 0.35) * rows), 3))
    image = _languages(top, result) if by_language else _directions(top, result)
    figure.colorbar(image, ax=top)
    for label, curve in (("base model alone", result.base), ("as measured", result)):
        if curve is not None:
            means = [curve.mean(layer) for layer in range(len(curve.layers))]
            bottom.plot(means, marker=".", label=label)
    bottom.set(xlabel="layer", ylabel="mean over directions", ylim=(0, 1))
    bottom.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png", metadata={"Software": "adaptermix"})
    write_whole(path, content.getvalue())


def _directions(axes: Axes, result: Retrieval) -> AxesImage:
    """Draw the accuracy of each direction at each layer."""
    names = list(result.layers[0])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="layer", title="retrieval accuracy")
    return axes.imshow([[layer[name] for layer in result.layers] for name in names], aspect="auto", vmin=0, vmax=1)


def _languages(axes: Axes, result: Retrieval) -> AxesImage:
    """Draw the mean accuracy over even layers from each language to each; pairs without data are grey."""
    from matplotlib import colormaps

    languages, table = result.table()
    axes.set_xticks(range(len(languages)), languages, rotation=90, fontsize=7)
    axes.set_yticks(range(len(languages)), languages, fontsize=7)
    axes.set(xlabel="language of the candidates", ylabel="language of the queries", title="accuracy, even layers")
    cells = [[math.nan if value is None else value for value in row] for row in table]
    return axes.imshow(cells, cmap=colormaps["viridis"].with_extremes(bad="#dadce0"), vmin=0, vmax=1)
