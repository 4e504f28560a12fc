"""The demo's two pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {"before": "#9aa0a6", "after": "#1a73e8", "base": "#dadce0", "task only": "#9aa0a6", "chosen": "#1a73e8"}


def draw(results: dict[str, Any], out: Path) -> None:
    """Write `layers.png` (retrieval per layer) and `weights.png` (dev score per weight, test score per language)."""
    import matplotlib as mpl

    mpl.use("Agg")
    _layers(results, out / "layers.png")
    _weights(results, out / "weights.png")


def _layers(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, document in results["retrieval"].items():
        layers = [int(layer) for layer in document["layers"]]
        means = [document["layers"][str(layer)]["mean"] for layer in layers]
        label = {"before": "base model", "after": "with alignment adapter"}[name]
        axes.plot(layers, means, color=_COLOURS[name], label=label, linewidth=2)
    middle = max(layers) // 2
    axes.axvline(middle, color="#d93025", linewidth=0.8, linestyle="--", label=f"aligned layer {middle}")
    axes.set(
        xlabel="layer", ylabel="retrieval accuracy", ylim=(0, 1), title="Translation retrieval, held-out sentences"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _weights(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained", width_ratios=(1, 2))
    trials = results["search"]["trials"]
    weights = [trial["weights"][0] for trial in trials]
    values = [trial["value"] for trial in trials]
    spread = [
        [value - trial["low"] for value, trial in zip(values, trials, strict=True)],
        [trial["high"] - value for value, trial in zip(values, trials, strict=True)],
    ]
    left.errorbar(weights, values, yerr=spread, color=_COLOURS["chosen"], marker="o", capsize=4)
    left.set(xlabel="weight of the task adapter", ylabel="F1, mean of languages", title="dev", ylim=(0, 1))
    tests = results["test"]
    languages = list(tests["chosen"]["scores"])
    for number, (name, document) in enumerate(tests.items()):
        places = [place + (number - 1) * 0.27 for place in range(len(languages))]
        scores = [document["scores"][language] for language in languages]
        heights = [score["value"] for score in scores]
        error = [
            [score["value"] - score["low"] for score in scores],
            [score["high"] - score["value"] for score in scores],
        ]
        label = f"weight {results['search']['best']['weights'][0]:g}" if name == "chosen" else name
        right.bar(places, heights, 0.27, yerr=error, color=_COLOURS[name], label=label, ecolor="#5f6368", capsize=1)
    right.set_xticks(range(len(languages)), languages)
    right.set(title="test, with 95 % intervals", ylim=(0, 1))
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
