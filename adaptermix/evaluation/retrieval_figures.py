"""Figures of retrieval: a heatmap over layers and directions, and the mean per layer."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..io.files import write_whole

Layers = Sequence[Mapping[str, float]]
"""For each layer the accuracy per direction."""


def draw(layers: Layers, path: Path, *, base: Layers | None = None) -> None:
    """Write the figure.

    Args:
        layers: The accuracies.
        path: The PNG file.
        base: The accuracies of the base model alone, if measured.
    """
    from matplotlib.figure import Figure

    directions = list(layers[0])
    figure = Figure(figsize=(6 + 0.22 * len(layers), 4 + 0.16 * len(directions)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(max(2, 0.35 * len(directions)), 3))
    image = top.imshow([[layer[name] for layer in layers] for name in directions], aspect="auto", vmin=0, vmax=1)
    top.set_yticks(range(len(directions)), directions, fontsize=7)
    top.set(xlabel="layer", title="retrieval accuracy")
    figure.colorbar(image, ax=top)
    for label, curve in (("base model alone", base), ("as measured", layers)):
        if curve is not None:
            means = [sum(layer.values()) / len(layer) for layer in curve]
            bottom.plot(means, marker=".", label=label)
    bottom.set(xlabel="layer", ylabel="mean over directions", ylim=(0, 1))
    bottom.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png", metadata={"Software": "adaptermix"})
    write_whole(path, content.getvalue())
