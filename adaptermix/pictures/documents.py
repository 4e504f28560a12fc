"""The pictures of a JSON document: scores per language, the weights of a search, interference, alignment per layer.

Documents may be read from files, so every value is checked. A document without the keys of a picture gives an empty
list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..models.location import kinds_of, layers_of, locations, mean
from ..tasks.data.languages import split_pair
from .charts import Point, bars, curve, heatmap
from .svg import Chart, Picture

Document = Mapping[str, Any]
_LARGEST = 1e15
_MOST_PAIRS = 3
"""With more pairs of adapters, the picture of an inspection compares adapters and not their layers."""


def number_of(value: object) -> float | None:
    """Return a number of a JSON document; None for another value, and for one beyond all scores and norms."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if -_LARGEST <= value <= _LARGEST else None  # False for NaN


def point_of(document: object) -> Point | None:
    """Return a score of a JSON document, `{"value", "low", "high"}`; None for another value."""
    if not isinstance(document, Mapping) or (value := number_of(document.get("value"))) is None:
        return None
    return Point(value=value, low=number_of(document.get("low")), high=number_of(document.get("high")))


def points_of(documents: object) -> dict[str, Point]:
    """Return scores by name, without the entries that are not scores."""
    entries = mapping_of(documents).items()
    return {str(name): point for name, value in entries if (point := point_of(value)) is not None}


def mapping_of(value: object) -> Document:
    """Return a value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, Mapping) else {}


def list_of(value: object) -> Sequence[Any]:
    """Return a value if it is a list, else an empty list."""
    return value if isinstance(value, list | tuple) else []


def kind_of(document: object) -> str:
    """Return the command that a JSON document is from, recognised by its keys; empty if it is from none of these."""
    keys = set(mapping_of(document))
    signs = {
        "search": {"best", "trials", "task_alone"},
        "evaluate": {"task", "metric", "scores"},
        "retrieve": {"layers", "headline"},
        "inspect": {"adapters", "pairs"},
    }
    return next((kind for kind, sign in signs.items() if sign <= keys), "")


def pictures_of(document: Document) -> list[Picture]:
    """Return the pictures of the JSON document of `evaluate`, `search`, `retrieve` or `inspect`.

    Args:
        document: The document; one of another command has no picture.
    """
    makers = {"search": _search, "evaluate": _evaluation, "retrieve": _retrieval, "inspect": _inspection}
    maker = makers.get(kind_of(document))
    return [Picture(title=title, charts=charts) for title, charts in (maker(document) if maker else []) if charts]


def picture_of(document: Document) -> Picture:
    """Return all pictures of a document as one; see `pictures_of`."""
    pictures = pictures_of(document)
    title = ", ".join(picture.title for picture in pictures)
    return Picture(title=title, charts=[chart for picture in pictures for chart in picture.charts])


def _evaluation(document: Document) -> list[tuple[str, list[Chart]]]:
    against = mapping_of(document.get("against"))
    series = {str(against.get("name")): points_of(against.get("scores")), "this system": points_of(document["scores"])}
    return [bars_of(f"{document['task']}: {document['metric']}", series)]


def bars_of(title: str, series: Mapping[str, Mapping[str, Point]]) -> tuple[str, list[Chart]]:
    """Return a title, and bars per language with 95 % intervals, without the series that have no points."""
    drawn = {name: points for name, points in series.items() if points}
    return title, [bars(title, drawn)] if drawn else []


def _search(document: Document) -> list[tuple[str, list[Chart]]]:
    alone, metric = mapping_of(document["task_alone"]), document.get("metric")
    series = {"task adapter alone": points_of(alone.get("scores")), "chosen": points_of(document.get("scores"))}
    return [("weights and scores", _weights(document)), bars_of(f"{metric} per language", series)]


def _weights(document: Document) -> list[Chart]:
    """Return the curve of a search with one free weight, such as `--grid`; else no chart."""
    trials = [
        (weights, point)
        for trial in map(mapping_of, list_of(document["trials"]))
        if (weights := vector_of(trial.get("weights"))) and not trial.get("name") and (point := point_of(trial))
    ]
    if len({len(weights) for weights, _ in trials}) != 1:
        return []
    columns = list(zip(*(weights for weights, _ in trials), strict=True))
    free = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    sums_to_one = len(columns) == 2 and all(abs(sum(weights) - 1) < 1e-6 for weights, _ in trials)
    if not free or len(free) > 1 + sums_to_one:
        return []
    axis = free[-1]
    positions = {weights[axis]: point for weights, point in trials}
    best = vector_of(mapping_of(document["best"]).get("weights"))
    level = point_of(document["task_alone"])
    chart = curve(
        f"{document.get('metric')} over the weight",
        list(positions.items()),
        across=f"weight of adapter {axis + 1}",
        chosen=best[axis] if len(best) > axis and best[axis] in positions else None,
        level=("task adapter alone", level.value) if level else None,
    )
    return [chart]


def vector_of(value: object) -> list[float]:
    """Return a list of numbers of a JSON document; empty for another value."""
    numbers = [number_of(item) for item in list_of(value)]
    return [number for number in numbers if number is not None] if None not in numbers else []


def _retrieval(document: Document) -> list[tuple[str, list[Chart]]]:
    title = "retrieval accuracy"
    charts = [_languages(title, mapping_of(document["layers"]))]
    if base := mapping_of(mapping_of(document.get("base")).get("layers")):
        charts.append(_languages("base model alone", base))
    return [(title, [chart for chart in charts if chart is not None])]


def _languages(title: str, layers: Document) -> Chart | None:
    """Return a heatmap of languages and layers: the mean over the directions from and to a language."""
    cells: dict[str, dict[str, list[float]]] = {}
    for layer, entry in layers.items():
        for direction, value in mapping_of(mapping_of(entry).get("directions")).items():
            accuracy = number_of(value)
            for language in split_pair(str(direction)) if accuracy is not None else ():
                cells.setdefault(language, {}).setdefault(str(layer), []).append(accuracy)  # type: ignore[arg-type]
    rows = {language: {layer: mean(values) for layer, values in row.items()} for language, row in cells.items()}
    return heatmap(title, rows, across="languages by layers, 0 is the embeddings") if rows else None


def _inspection(document: Document) -> list[tuple[str, list[Chart]]]:
    pairs = {str(name): mapping_of(pair) for name, pair in mapping_of(document["pairs"]).items()}
    charts = []
    for key, low in (("cosine", -1.0), ("overlap", 0.0), ("sign_conflict", 0.0)):
        title = key.replace("_", " ")
        if len(pairs) > _MOST_PAIRS:
            rows: dict[str, dict[str, float | None]] = {}
            names = list(mapping_of(document["adapters"]))
            for pair in pairs.values():
                rows.setdefault(str(pair.get("a")), dict.fromkeys(names))[str(pair.get("b"))] = number_of(pair.get(key))
            charts.append(heatmap(title, rows, across="adapters", low=low))
        else:
            charts += [
                chart
                for name, pair in pairs.items()
                if (chart := modules_heatmap(f"{title}: {name}", mapping_of(pair.get("modules")), key, low=low))
            ]
    return [("interference", charts)]


def modules_heatmap(title: str, modules: Document, key: str, *, low: float = 0.0) -> Chart | None:
    """Return a heatmap of layers and module kinds; None without a value.

    Args:
        title: The title.
        modules: Entries by path of the module.
        key: The key of the number in each entry; cells are means over the modules of one kind.
        low: The lower end of the colours.
    """
    values = {str(path): number_of(mapping_of(entry).get(key)) for path, entry in modules.items()}
    if all(value is None for value in values.values()):
        return None
    located = locations(values)
    kinds = {name: set(paths) for name, paths in kinds_of(located).items()}
    rows: dict[str, dict[str, float | None]] = {
        layer: {kind: mean(values[path] for path in paths if path in members) for kind, members in kinds.items()}
        for layer, paths in layers_of(located).items()
    }
    return heatmap(title, rows, across="layers by module kinds", low=low)


def loss_picture(rows: Iterable[Document]) -> Picture | None:
    """Return the curve of the loss over the steps of a training run; None for fewer than two steps.

    Args:
        rows: Lines of `history.jsonl`.
    """
    points = [
        (step, Point(value=loss))
        for row in rows
        if (step := number_of(row.get("step"))) is not None and (loss := number_of(row.get("loss"))) is not None
    ]
    width = max(1, math.ceil(len(points) / 150))
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    means = [(group[-1][0], Point(value=sum(p.value for _, p in group) / len(group))) for group in bins]
    if len(means) < 2 or any(a[0] >= b[0] for a, b in pairwise(means)):
        return None
    return Picture(title="training loss", charts=[curve("training loss", means, across="step")])
