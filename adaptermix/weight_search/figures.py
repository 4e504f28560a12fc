"""A search in pictures: weights against scores, languages, all parameters at once, weights over the layers, cost."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .space import Candidate

if TYPE_CHECKING:
    from .result import SearchResult

_MOST_AXES = 12
_CHOSEN, _ALONE, _OTHER = "#c0392b", "#7f8c8d", "#2c6fbb"


def coordinates(candidate: Candidate, *, pairs: bool = False) -> dict[str, Any]:
    """Return what is told of a candidate on the axes of a picture, by name.

    Args:
        candidate: The candidate.
        pairs: Whether weights are pairs that sum to 1, of which the first is enough.
    """
    found: dict[str, Any] = {}
    for where, point in _vectors(candidate).items():
        told = point[:1] if pairs else point
        found |= {f"{where}weight {number + 1}": weight for number, weight in enumerate(told)}
    return found | dict(candidate.options)


def _vectors(candidate: Candidate) -> dict[str, tuple[float, ...]]:
    """Return the weights of every place, by its name."""
    if not candidate.overrides:
        return {"": candidate.weights}
    found = {}
    for place in candidate.overrides:
        where = f"{place.layers[0]}-{place.layers[1]}" if place.layers else place.modules
        for number, point in enumerate(place.points):
            knot = f" ({number + 1})" if len(place.points) > 1 else ""
            found[f"{where}{knot}: "] = point
    return found


def _are_pairs(result: SearchResult) -> bool:
    vectors = [vector for trial in result.trials for vector in _vectors(trial.candidate).values()]
    return all(len(vector) == 2 and abs(sum(vector) - 1) < 1e-6 for vector in vectors)


def pictures(result: SearchResult) -> dict[str, bytes]:
    """Return PNGs by name; those that would show nothing are not there."""
    # a merge that was there before has axes of its own
    weighed = [place for place, trial in enumerate(result.trials) if not trial.candidate.name]
    plain = replace(
        result,
        trials=[result.trials[place] for place in weighed],
        scores=[result.scores[place] for place in weighed],
        languages=[result.languages[place] for place in weighed],
    )
    makers: Mapping[str, Callable[[SearchResult, Any], bool]] = {
        "weights": _weights,
        "languages": _languages,
        "parameters": _parameters,
        "layers": _layers,
        "cost": _cost,
    }
    found = {}
    for name, make in makers.items():
        if content := _png(partial(make, plain if make in (_weights, _parameters) else result)):
            found[name] = content
    return found


def _png(make: Callable[[Any], bool]) -> bytes | None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    if not make(figure):
        return None
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png", metadata={"Software": None})
    return content.getvalue()


def _numbers(result: SearchResult) -> dict[str, list[float]]:
    """Return the axes that hold numbers, and differ between trials."""
    rows = [coordinates(trial.candidate, pairs=_are_pairs(result)) for trial in result.trials]
    axes = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return {
        name: values
        for name, values in axes.items()
        if all(isinstance(value, int | float) for value in values) and len(set(values)) > 1
    }


def _weights(result: SearchResult, figure: Any) -> bool:
    """One parameter against the score, with intervals; two as a surface of points."""
    axes = _numbers(result)
    if len(axes) not in (1, 2):
        return False
    plot = figure.subplots()
    values = [score.value for score in result.scores]
    if len(axes) == 2:
        (first, x), (second, y) = axes.items()
        points = plot.scatter(x, y, c=values, s=50)
        figure.colorbar(points, ax=plot, label=result.objective_name)
        plot.set(xlabel=first, ylabel=second)
        return True
    ((name, x),) = axes.items()
    low = [score.value - score.low for score in result.scores]
    high = [score.high - score.value for score in result.scores]
    plot.errorbar(x, values, yerr=(low, high), fmt="o", color=_OTHER, capsize=3, label="trials, 95 % interval")
    plot.axhline(result.baseline_score.value, color=_ALONE, linestyle="--", label="task adapter alone")
    if name in coordinates(result.chosen.candidate) and not result.chosen.candidate.name:
        plot.plot(
            coordinates(result.chosen.candidate)[name],
            result.chosen_score.value,
            "o",
            color=_CHOSEN,
            label="chosen",
            zorder=5,
        )
    plot.set(xlabel=name, ylabel=result.objective_name)
    plot.legend(frameon=False)
    return True


def _languages(result: SearchResult, figure: Any) -> bool:
    """Score per language of the chosen candidate and of the task adapter alone."""
    plot = figure.subplots()
    names = list(result.baseline_languages)
    sides = (
        ("task adapter alone", result.baseline_languages, _ALONE),
        ("chosen", result.evaluation.scores, _CHOSEN),
    )
    for side, (label, scores, color) in enumerate(sides):
        x = [place + 0.4 * side - 0.2 for place in range(len(names))]
        found = [scores[name] for name in names]
        low = [score.value - score.low for score in found]
        high = [score.high - score.value for score in found]
        plot.bar(x, [score.value for score in found], 0.38, yerr=(low, high), color=color, label=label, capsize=2)
    plot.set_xticks(range(len(names)), names, rotation=90 if len(names) > 12 else 0)
    plot.set(ylabel=result.measure)
    plot.legend(frameon=False)
    return True


def _parameters(result: SearchResult, figure: Any) -> bool:
    """Parallel coordinates: a line per trial, over all parameters, to its score."""
    from matplotlib import colormaps

    axes = dict(list(_numbers(result).items())[:_MOST_AXES])
    if len(axes) < 2 or len(result.trials) < 2:
        return False
    values = [score.value for score in result.scores]
    axes[f"{result.chosen_on} {result.objective}"] = values
    plot = figure.subplots()
    bounds = {name: (min(column), max(column)) for name, column in axes.items()}
    for number in sorted(range(len(values)), key=lambda trial: values[trial]):
        heights = [_share(column[number], *bounds[name]) for name, column in axes.items()]
        plot.plot(heights, color=colormaps["viridis"](_share(values[number], min(values), max(values))), alpha=0.7)
    labels = [f"{name}\n{bounds[name][0]:.3g} to {bounds[name][1]:.3g}" for name in axes]
    plot.set_xticks(range(len(axes)), labels, fontsize=7, rotation=30 if len(axes) > 5 else 0)
    plot.set_yticks([])
    return True


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _layers(result: SearchResult, figure: Any) -> bool:
    """Weight of every adapter over the layers, where the chosen candidate's differ by layer."""
    places = [place for place in result.chosen.candidate.overrides if place.layers]
    if not places:
        return False
    plot = figure.subplots()
    layers = range(max(place.layers[1] for place in places if place.layers) + 1)
    held = {layer: place for place in places for layer in layers if place.covers(f"layers.{layer}")}
    vectors = {layer: place.weights(f"layers.{layer}") for layer, place in held.items()}
    for number in range(len(result.chosen.candidate.weights)):
        heights = [vector[number] for vector in vectors.values() if vector]
        plot.plot(list(vectors), heights, drawstyle="steps-mid", marker=".", label=f"adapter {number + 1}")
    plot.set(xlabel="layer", ylabel="weight")
    plot.legend(frameon=False)
    return True


def _cost(result: SearchResult, figure: Any) -> bool:
    """The best score so far against the rows that were asked."""
    plot = figure.subplots()
    rows, best, spent, top = [], [], 0, result.baseline_score.value
    for trial, score in zip(result.trials, result.scores, strict=True):
        spent += trial.rows
        top = max(top, score.value) if trial.is_whole else top
        rows.append(spent)
        best.append(top)
    plot.step(rows, best, where="post", color=_OTHER)
    plot.set(xlabel=f"{result.rows_name} asked", ylabel=f"best {result.measure} so far")
    return True
