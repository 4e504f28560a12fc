"""Retrieval in pictures: a heatmap over layers and directions, and the mean per layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import write_whole

if TYPE_CHECKING:
    from .retrieval import Retrieval


def draw(result: Retrieval, path: Path) -> None:
    """Write the picture; with the base model's accuracies beside those of the adapter, if there are any."""
    from matplotlib.figure import Figure

    directions = list(result.layers[0])
    figure = Figure(figsize=(6 + 0.22 * len(result.layers), 4 + 0.16 * len(directions)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(max(2, 0.35 * len(directions)), 3))
    image = top.imshow([[layer[name] for layer in result.layers] for name in directions], aspect="auto", vmin=0, vmax=1)
    top.set_yticks(range(len(directions)), directions, fontsize=7)
    top.set(xlabel="layer", title="retrieval accuracy")
    figure.colorbar(image, ax=top)
    for label, found in (("base model alone", result.base), ("as measured", result)):
        if found is not None:
            _curve(bottom, found, label)
    bottom.set(xlabel="layer", ylabel="mean over directions", ylim=(0, 1))
    bottom.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png", metadata={"Software": "adaptermix"})
    write_whole(path, content.getvalue())


def _curve(axes: Any, found: Retrieval, label: str) -> None:
    axes.plot([found.mean(layer) for layer in range(len(found.layers))], marker=".", label=label)
