"""The demo's two pictures."""

from __future__ import annotations

from pathlib import Path

from .words import TITLES, Document, label_of

_COLOURS = {
    "before": "#9aa0a6",
    "after": "#1a73e8",
    "base": "#dadce0",
    "task only": "#9aa0a6",
    "chosen": "#1a73e8",
    "closed form": "#f9ab00",
}


def draw(results: Document, out: Path) -> None:
    """Write `layers.png` (retrieval per layer) and `weights.png` (dev score per weight, test score per language)."""
    import matplotlib as mpl

    mpl.use("Agg")
    _layers(results, out / "layers.png")
    _weights(results, out / "weights.png")


def _layers(results: Document, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, document in results["retrieval"].items():
        layers = [int(layer) for layer in document["layers"]]
        means = [document["layers"][str(layer)]["mean"] for layer in layers]
        label = {"before": "base model", "after": "with alignment adapter"}[name]
        axes.plot(layers, means, color=_COLOURS[name], label=label, linewidth=2)
    aligned = results["layer"]
    axes.axvline(aligned, color="#d93025", linewidth=0.8, linestyle="--", label=f"aligned layer {aligned}")
    axes.set(
        xlabel="layer", ylabel="retrieval accuracy", ylim=(0, 1), title="Translation retrieval, held-out sentences"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _weights(results: Document, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained", width_ratios=(1, 2))
    trials = sorted(results["search"]["trials"], key=lambda trial: trial["weights"][1])
    left.errorbar(
        [trial["weights"][1] for trial in trials],
        [trial["value"] for trial in trials],
        yerr=_spread(trials),
        color=_COLOURS["chosen"],
        marker="o",
        capsize=4,
    )
    left.set(xlabel="weight of the alignment adapter", ylabel=f"{results['score']}, mean of languages", title="dev")
    left.set(ylim=(0, 1))
    tests = results["test"]
    members = tests["chosen"]["members"]
    languages = [name for role in ("supervised", "aligned", "transfer") for name in members.get(role, ())]
    width = 0.81 / len(tests)
    for number, (name, document) in enumerate(tests.items()):
        indices = [index + (number - (len(tests) - 1) / 2) * width for index in range(len(languages))]
        scores = [document["scores"][language] for language in languages]
        right.bar(
            indices,
            [score["value"] for score in scores],
            width,
            yerr=_spread(scores),
            color=_COLOURS[name],
            label=label_of(name, results),
            ecolor="#5f6368",
            capsize=1,
        )
    right.set_xticks(range(len(languages)), languages)
    groups = ", ".join(f"{TITLES[role]}: {' '.join(names)}" for role, names in members.items() if role in TITLES)
    right.set(title="test, with 95 % intervals", ylim=(0, 1.15), xlabel=groups)
    right.legend(frameon=False, loc="upper center", ncols=len(tests))  # above the bars
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _spread(scores: list[Document]) -> list[list[float]]:
    """Return how far the intervals reach below and above the values."""
    return [[s["value"] - s["low"] for s in scores], [s["high"] - s["value"] for s in scores]]
