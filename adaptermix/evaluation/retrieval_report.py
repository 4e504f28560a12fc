"""The report of `retrieve`: accuracy per layer, direction, language and group of languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..pictures import Picture, picture_of
from ..tasks import Metric
from ..tasks.data.languages import split_pair
from ..tasks.metrics import mean, mean_ends
from .score import Score, documents, draws, hedged_interval, mean_score
from .transfer import Correlation

Hits = tuple[float, ...]
"""For each sentence 1 if its translation was retrieved, else 0."""
_ACCURACY = Metric(name="accuracy", count=lambda _, answer: (float(answer == "right"), 1.0), value=mean, ends=mean_ends)


@dataclass(frozen=True, kw_only=True, repr=False)
class Retrieval(ResultView):
    """Retrieval accuracy per layer and direction.

    Args:
        hits: For each layer (0 is the embeddings) and direction, such as `de-en`, whether each sentence's translation
            was retrieved.
        n: Sentences per direction.
        base: Results of the base model alone, if requested.
        correlation: Correlation of retrieval with task scores, if these were passed.
        groups: Languages of each group, by name.
        candidates_from: The model or adapter that embedded the candidates, if it is another than that of the queries.
        seed: Seed of the resampling for the intervals.
        split: Use of the sentences, dev or test, if stated.
    """

    hits: tuple[Mapping[str, Hits], ...]
    n: Mapping[str, int]
    base: Retrieval | None = None
    correlation: Correlation | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    candidates_from: str | None = None
    seed: int = 0
    split: str | None = None

    @cached_property
    def layers(self) -> tuple[Mapping[str, float], ...]:
        """Return for each layer the accuracy per direction."""
        return tuple({name: sum(right) / len(right) for name, right in layer.items()} for layer in self.hits)

    def mean(self, layer: int) -> float:
        """Return the mean over directions at a layer."""
        values = self.layers[layer].values()
        return sum(values) / len(values)

    def _even(self) -> range:
        """Even layers, embeddings left out, as in the mid-align paper."""
        return range(2, len(self.layers), 2) if len(self.layers) > 2 else range(1, len(self.layers))

    def headline(self) -> float:
        """Return the mean over directions and even layers."""
        even = self._even()
        return sum(self.mean(layer) for layer in even) / len(even)

    def by_language(self) -> dict[str, float]:
        """Return for each language the mean over even layers and over the directions from and to it."""
        accuracies: dict[str, list[float]] = {}
        for layer in self._even():
            for direction, value in self.layers[layer].items():
                for language in split_pair(direction):
                    accuracies.setdefault(language, []).append(value)
        return {language: sum(values) / len(values) for language, values in accuracies.items()}

    def direction_scores(self, layer: int) -> dict[str, Score]:
        """Return for each direction the accuracy at a layer, with its interval over sentences."""
        return {name: mean_score(_ACCURACY, [_rows(right)], seed=self.seed) for name, right in self.hits[layer].items()}

    def score(self, layers: Sequence[int] | None = None) -> Score:
        """Return the mean over directions and layers, with its interval over sentences; default even layers.

        All directions and layers with the same number of sentences share their resamples; see `draws`.
        """
        shares = self._shares(self._even() if layers is None else layers)
        return mean_score(_ACCURACY, list(shares.values()), seed=self.seed)

    def group_scores(self) -> dict[str, Score]:
        """Return for each group the mean over even layers and its directions, with its interval over sentences.

        The directions of a group are those from or to one of its languages, each once.
        """
        shares = self._shares(self._even())
        return {
            name: mean_score(
                _ACCURACY,
                [rows for key, rows in shares.items() if set(split_pair(key)) & set(languages)],
                seed=self.seed,
            )
            for name, languages in self.groups.items()
        }

    def table(self) -> tuple[list[str], list[list[float | None]]]:
        """Return the languages, and the mean over even layers from each to each; None for a direction without data."""
        languages = list(dict.fromkeys(language for name in self.layers[0] for language in split_pair(name)))
        even = [self.layers[layer] for layer in self._even()]
        means = {tuple(split_pair(name)): sum(layer[name] for layer in even) / len(even) for name in self.layers[0]}
        return languages, [[means.get((one, two)) for two in languages] for one in languages]

    @property
    def counts(self) -> dict[str, list[tuple[float, float]]]:
        """For each direction the statistics of the headline score, sentence by sentence."""
        return self._shares(self._even())

    @property
    def resamples(self) -> list[float]:
        """The headline score on the sentences, then on resamples of them; results with one seed share resamples."""
        each = [draws(_ACCURACY, [rows], self.seed)[0] for rows in self.counts.values()]
        resamples: list[float] = np.mean(each, axis=0).tolist()
        return resamples

    def above_base(self) -> Score | None:
        """Return the gain of the mean over even layers over the base model, paired by sentence."""
        if self.base is None:
            return None
        ours, theirs = self.counts, self.base.counts
        both = [draws(_ACCURACY, [theirs[name], ours[name]], self.seed, hedge="pair") for name in self.n]
        gains = np.mean([adapted - base for base, adapted in both], axis=0)
        return hedged_interval(_ACCURACY, gains, n=sum(self.n.values()), least=-1.0)

    def _shares(self, layers: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
        """Return for each direction and sentence the share of layers in which its translation was retrieved, as rows.

        The mean over layers equals the mean of these shares over sentences.
        """
        return {name: _rows(np.mean([self.hits[layer][name] for layer in layers], axis=0).tolist()) for name in self.n}

    def plot(self) -> Picture:
        """Return a heatmap of languages and layers as SVG, for notebooks and `save`."""
        return picture_of(self.document())

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix retrieve`."""
        layers = {
            str(number): {
                "mean": self.mean(number),
                "directions": dict(directions),
                "score": self.score([number]).document(),
                "scores": documents(self.direction_scores(number)),
            }
            for number, directions in enumerate(self.layers)
        }
        document: JsonObject = {
            "layers": layers,
            "headline": self.headline(),
            "score": self.score().document(),
            "languages": self.by_language(),
            "n": dict(self.n),
        }
        if self.groups:
            document["groups"] = documents(self.group_scores())
        if self.candidates_from:
            document["candidates_from"] = self.candidates_from
        if self.base:
            document["base"] = self.base.document()
        if above := self.above_base():
            document["above_base"] = above.document()
        if self.correlation:
            document["correlation"] = asdict(self.correlation)
        if self.split:
            document["split"] = self.split
        return document


def _rows(right: Sequence[float]) -> list[tuple[float, float]]:
    return [(value, 1.0) for value in right]
