"""A search in pictures: weights against scores, languages, all parameters at once, weights over the layers, cost."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

from .space import Candidate
from .storage import quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..evaluation.score import Score
    from .parameters import Plain
    from .result import SearchResult

_MOST_AXES = 12
_CHOSEN, _ALONE, _OTHER = "#c0392b", "#7f8c8d", "#2c6fbb"


def coordinates(candidate: Candidate, *, pairs: bool = False) -> dict[str, Plain]:
    """Return a candidate's weights and options, by the name of their axis.

    Args:
        candidate: The candidate.
        pairs: Whether weights are pairs that sum to 1, so that the first is enough.
    """
    axes: dict[str, Plain] = {}
    for prefix, vector in _vectors(candidate).items():
        axes |= {f"{prefix}weight {n}": weight for n, weight in enumerate(vector[: 1 if pairs else None], start=1)}
    return axes | dict(candidate.options)


def _vectors(candidate: Candidate) -> dict[str, tuple[float, ...]]:
    """Return the weight vectors by the name of their location."""
    if not candidate.overrides:
        return {"": candidate.weights}
    vectors = {}
    for override in candidate.overrides:
        where = f"{override.layers[0]}-{override.layers[1]}" if override.layers else override.modules
        for number, point in enumerate(override.points, start=1):
            vectors[f"{where} ({number}): " if len(override.points) > 1 else f"{where}: "] = point
    return vectors


def _axes(result: SearchResult) -> dict[str, list[Plain]]:
    """Return the axes on which trials differ."""
    vectors = [vector for trial in result.trials for vector in _vectors(trial.candidate).values()]
    pairs = all(len(vector) == 2 and abs(sum(vector) - 1) < 1e-6 for vector in vectors)
    rows = [coordinates(trial.candidate, pairs=pairs) for trial in result.trials]
    axes = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return {name: values for name, values in axes.items() if len(set(map(str, values))) > 1}


def _is_numeric(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def pictures(result: SearchResult) -> dict[str, bytes]:
    """Return PNGs by name, without those that would show nothing."""
    # A merge that existed before the search has other axes.
    searched = [index for index, trial in enumerate(result.trials) if not trial.candidate.name]
    plain = replace(
        result,
        trials=[result.trials[index] for index in searched],
        scores=[result.scores[index] for index in searched],
        languages=[result.languages[index] for index in searched],
    )
    drawers: dict[str, Callable[[], Figure | None]] = {
        "weights": lambda: _weights(plain),
        "languages": lambda: _languages(result),
        "parameters": lambda: _parameters(plain),
        "layers": lambda: _layers(result),
        "cost": lambda: _cost(result),
    }
    return {name: _png(figure) for name, draw in drawers.items() if (figure := draw()) is not None}


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png", metadata={"Software": None})
    return content.getvalue()


def _plot() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()


def _errors(scores: Sequence[Score]) -> tuple[list[float], list[float]]:
    """Return the lengths of the error bars below and above."""
    return [score.value - score.low for score in scores], [score.high - score.value for score in scores]


def _weights(result: SearchResult) -> Figure | None:
    """One parameter against the score, with intervals; two as a surface of points."""
    axes = {name: values for name, values in _axes(result).items() if _is_numeric(values)}
    if len(axes) not in (1, 2):
        return None
    figure, plot = _plot()
    values = [score.value for score in result.scores]
    if len(axes) == 2:
        (first, x), (second, y) = axes.items()
        figure.colorbar(plot.scatter(x, y, c=values, s=50), ax=plot, label=result.objective_name)
        plot.set(xlabel=first, ylabel=second)
        return figure
    ((name, x),) = axes.items()
    bars = _errors(result.scores)
    plot.errorbar(x, values, yerr=bars, fmt="o", color=_OTHER, capsize=3, label="trials, 95 % interval")
    plot.axhline(result.baseline_score.value, color=_ALONE, linestyle="--", label="task adapter alone")
    chosen = result.chosen.candidate
    if not chosen.name and name in coordinates(chosen):
        point = coordinates(chosen)[name], result.chosen_score.value
        plot.plot(*point, "o", color=_CHOSEN, label="chosen", zorder=5)
    plot.set(xlabel=name, ylabel=result.objective_name)
    plot.legend(frameon=False)
    return figure


def _languages(result: SearchResult) -> Figure:
    """Score per language of the chosen candidate and of the task adapter alone."""
    figure, plot = _plot()
    names = list(result.baseline_languages)
    bars = (("task adapter alone", result.baseline_languages, _ALONE), ("chosen", result.evaluation.scores, _CHOSEN))
    for side, (label, by_language, color) in enumerate(bars):
        x = [index + 0.4 * side - 0.2 for index in range(len(names))]
        scores = [by_language[name] for name in names]
        heights = [score.value for score in scores]
        plot.bar(x, heights, 0.38, yerr=_errors(scores), color=color, label=label, capsize=2)
    plot.set_xticks(range(len(names)), names, rotation=90 if len(names) > 12 else 0)
    plot.set(ylabel=result.measure)
    plot.legend(frameon=False)
    return figure


def _parameters(result: SearchResult) -> Figure | None:
    """Parallel coordinates by optuna: a line per trial, over its score and all parameters."""
    axes = dict(list(_axes(result).items())[:_MOST_AXES])
    if len(axes) < 2 or len(result.trials) < 2:
        return None
    from matplotlib import pyplot, rc_context
    from optuna import create_study
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.trial import create_trial
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    numeric = {name: _is_numeric(values) for name, values in axes.items()}
    params = {name: values if numeric[name] else list(map(str, values)) for name, values in axes.items()}
    distributions = {
        name: FloatDistribution(min(values), max(values))
        if numeric[name]
        else CategoricalDistribution(sorted(set(values)))
        for name, values in params.items()
    }
    with quiet(), rc_context():  # optuna sets a style for all figures.
        study = create_study(direction="maximize")
        for number, score in enumerate(result.scores):
            point = {name: values[number] for name, values in params.items()}
            study.add_trial(create_trial(params=point, distributions=distributions, value=score.value))
        plot = plot_parallel_coordinate(study, target_name=f"{result.chosen_on} {result.objective}")
        pyplot.close(plot.figure)  # Otherwise pyplot keeps it.
    plot.set_title("")
    plot.figure.set_layout_engine("tight")
    figure: Figure = plot.figure
    return figure


def _layers(result: SearchResult) -> Figure | None:
    """Weight of every adapter over the layers, where the chosen candidate's differ by layer."""
    overrides = [override for override in result.chosen.candidate.overrides if override.layers]
    if not overrides:
        return None
    figure, plot = _plot()
    layers = range(max(override.layers[1] for override in overrides if override.layers) + 1)
    covering = {layer: override for override in overrides for layer in layers if override.covers(f"layers.{layer}")}
    vectors = {layer: override.weights(f"layers.{layer}") for layer, override in covering.items()}
    for number in range(len(result.chosen.candidate.weights)):
        heights = [vector[number] for vector in vectors.values() if vector]
        plot.plot(list(vectors), heights, drawstyle="steps-mid", marker=".", label=f"adapter {number + 1}")
    plot.set(xlabel="layer", ylabel="weight")
    plot.legend(frameon=False)
    return figure


def _cost(result: SearchResult) -> Figure:
    """The best score so far against the number of answered rows."""
    figure, plot = _plot()
    rows, best, total, top = [], [], 0, result.baseline_score.value
    for trial, score in zip(result.trials, result.scores, strict=True):
        total += trial.rows
        top = max(top, score.value) if trial.is_whole else top
        rows.append(total)
        best.append(top)
    plot.step(rows, best, where="post", color=_OTHER)
    plot.set(xlabel=f"{result.rows_name} asked", ylabel=f"best {result.measure} so far")
    return figure
