"""The search space: weights of adapters, for the whole model or by location, and options of the merge method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Protocol

from ..io.json_types import JsonObject
from ..merging.overrides import Override
from .parameters import Choice, Interval, Parameter, Plain, Point

_DIGITS = 3
"""Decimals of weights, so that a result can be typed again and near points are one candidate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The merge that a trial scores.

    Args:
        weights: One per adapter; where they differ by location, their mean over the overrides.
        overrides: Separate weights for some modules.
        options: Options of the method that were searched.
        name: Folder of a merge that existed before the search.
    """

    weights: tuple[float, ...]
    overrides: tuple[Override, ...] = ()
    options: Mapping[str, Plain] = field(default_factory=dict)
    name: str = ""

    def document(self) -> JsonObject:
        """Return plain data."""
        document: JsonObject = {"weights": list(self.weights)}
        if self.overrides:
            document["places"] = [override.entry() for override in self.overrides]
        if self.options:
            document["options"] = dict(self.options)
        if self.name:
            document["name"] = self.name
        return document

    @property
    def vectors(self) -> list[tuple[float, ...]]:
        """The weight vectors of all overrides, or the only one."""
        return [point for override in self.overrides for point in override.points] or [self.weights]

    @property
    def distance(self) -> float:
        """Distance of the weights from the first adapter alone: sum of |w - (1, 0, ...)|, mean over the vectors."""
        first = alone(len(self.weights)).weights
        gaps = [sum(abs(w - a) for w, a in zip(vector, first, strict=True)) for vector in self.vectors]
        return sum(gaps) / len(gaps)


def label_of(candidate: Candidate) -> str:
    """Return a short label of a candidate: weights, with bars between those of several locations, and options.

    Example:
        >>> label_of(Candidate(weights=(0.9, 0.1), options={"density": 0.25}))
        '0.9/0.1 density=0.25'
    """
    if candidate.name:
        return candidate.name
    weights = " | ".join("/".join(f"{weight:g}" for weight in vector) for vector in candidate.vectors)
    options = (f"{key}={f'{v:.4g}' if isinstance(v, float) else v}" for key, v in candidate.options.items())
    return " ".join([weights, *options])


class SearchSpace(Protocol):
    """The candidates of a search, by the values of their parameters."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Parameters by name."""

    def candidate(self, point: Point) -> Candidate:
        """Return the candidate of a point."""


@dataclass(frozen=True, slots=True)
class CandidateList:
    """A search space of given candidates, each of which is tried once."""

    candidates: Sequence[Candidate]

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The only parameter: the index of the candidate."""
        return {"candidate": Choice(tuple(range(len(self.candidates))))}

    def candidate(self, point: Point) -> Candidate:
        """Return the candidate of this index."""
        return self.candidates[int(point["candidate"])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    r"""Weights of k adapters and options of a method, as independent parameters.

    On the simplex, where weights are at least 0 and sum to 1, there are k - 1 parameters $u_i \in [0, 1]$ per vector,
    $w_i = r_i (1 - (1 - u_i)^{1/(k - 1 - i)})$ with $r_i$ what the earlier weights have left, so that uniform
    parameters give uniform weights; for two adapters $u_0$ is the first one's weight. Free weights are parameters
    themselves.

    Args:
        count: Number of adapters, k.
        simplex: Whether weights sum to 1.
        reach: Least and largest free weight; where both are equal, all weights are that number and no parameters.
        overrides: Groups of modules with separate weights, which cover all modules; none for one vector for all.
        idle: For each override the indices of the adapters that adapt no module there. Their free weights are 0 and
            no parameters, since they would change nothing.
        knots: Weight vectors per override: 1, or more for a curve over the layers.
        options: Options of the method.
    """

    count: int
    simplex: bool = True
    reach: tuple[float, float] = (0.0, 1.5)
    overrides: tuple[Override, ...] = ()
    idle: tuple[frozenset[int], ...] = ()
    knots: int = 1
    options: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Parameters by name."""
        if self._is_fixed:
            return dict(self.options)
        bounds = Interval(0.0, 1.0) if self.simplex else Interval(*self.reach)
        weights = {
            f"{prefix}w{i}": bounds
            for number, prefix in enumerate(self._prefixes())
            for i in range(self.count - self.simplex)
            if self.simplex or not self.idle or i not in self.idle[number // self.knots]
        }
        return weights | dict(self.options)

    @property
    def _is_fixed(self) -> bool:
        return not self.simplex and self.reach[0] == self.reach[1]

    def _prefixes(self) -> list[str]:
        """Return the prefix of the parameter names of each weight vector."""
        if not self.overrides:
            return [""]
        return [f"place{p}.{k}." for p in range(len(self.overrides)) for k in range(self.knots)]

    def candidate(self, point: Point) -> Candidate:
        """Return the candidate of a point."""
        vectors = [self._weights(point, prefix) for prefix in self._prefixes()]
        mean = tuple(round(sum(column) / len(vectors), _DIGITS) for column in zip(*vectors, strict=True))
        overrides = tuple(
            Override(
                modules=override.modules,
                layers=override.layers,
                points=tuple(vectors[number * self.knots : (number + 1) * self.knots]),
            )
            for number, override in enumerate(self.overrides)
        )
        return Candidate(weights=mean, overrides=overrides, options={name: point[name] for name in self.options})

    def _weights(self, point: Point, prefix: str) -> tuple[float, ...]:
        if not self.simplex:
            missing = self.reach[0] if self._is_fixed else 0.0
            return tuple(round(float(point.get(f"{prefix}w{i}", missing)), _DIGITS) for i in range(self.count))
        left: float = 1.0
        weights: list[float] = []
        for i in range(self.count - 1):
            share = 1 - (1 - float(point[f"{prefix}w{i}"])) ** (1 / (self.count - 1 - i))
            weights.append(round(left * share, _DIGITS))
            left -= weights[-1]
        return (*weights, round(left, _DIGITS))

    def point(self, weights: Sequence[float], options: Mapping[str, Plain]) -> dict[str, Plain] | None:
        """Return the point of weights that hold everywhere, or None if they are outside the space."""
        if self.simplex and (min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
            return None
        if not self.simplex and not all(self.reach[0] <= weight <= self.reach[1] for weight in weights):
            return None
        vector = self._shares(weights) if self.simplex else list(map(float, weights))
        named = {f"{prefix}w{i}": value for prefix in self._prefixes() for i, value in enumerate(vector)}
        return {key: value for key, value in named.items() if key in self.parameters} | dict(options)

    def _shares(self, weights: Sequence[float]) -> list[float]:
        left: float = 1.0
        shares: list[float] = []
        for i, weight in enumerate(weights[:-1]):
            share = min(1.0, weight / left) if left > 1e-9 else 1.0
            shares.append(1 - (1 - share) ** (self.count - 1 - i))
            left -= weight
        return shares

    def starts(self) -> list[tuple[float, ...]]:
        """Return the weights to try first: 0.9 for the first adapter, equal weights, and for free weights two sums."""
        if self.count == 1:
            return [] if self.simplex else [(1.0,)]
        others = self.count - 1
        starts = [(0.9, *[0.1 / others] * others), tuple([1 / self.count] * self.count)]
        return starts if self.simplex else [*starts, (1.0, *[0.5] * others), (1.0, *[1.0] * others)]


def alone(count: int) -> Candidate:
    """Return the first adapter alone: the baseline of every search."""
    return Candidate(weights=(1.0, *[0.0] * (count - 1)))


def grid_weights(grid: Sequence[float], count: int, *, simplex: bool) -> list[tuple[float, ...]]:
    """Return the weights of a grid, in order.

    On the simplex the last adapter gets what the others leave. Rows that leave less than 0 are dropped, except for two
    adapters, where weights such as (1.2, -0.2) are intended.

    Example:
        >>> grid_weights([0.5, 0.9], 2, simplex=True)
        [(0.5, 0.5), (0.9, 0.1)]
        >>> grid_weights([0.2, 0.6], 3, simplex=True)
        [(0.2, 0.2, 0.6), (0.2, 0.6, 0.2), (0.6, 0.2, 0.2)]
        >>> grid_weights([1.0, 0.5], 2, simplex=False)
        [(1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.5, 0.5)]
    """
    if not simplex:
        return [tuple(weights) for weights in product(grid, repeat=count)]
    rows = [(*weights, round(1.0 - sum(weights), 12)) for weights in product(grid, repeat=count - 1)]
    return rows if count == 2 else [row for row in rows if row[-1] >= 0]


def sums_of_grid(grid: Sequence[float], count: int) -> list[tuple[float, ...]]:
    """Return sums of the whole first adapter and shares of the others.

    Example:
        >>> sums_of_grid([0.5, 1.0], 2)
        [(1.0, 0.5), (1.0, 1.0)]
    """
    return [(1.0, *shares) for shares in product(grid, repeat=count - 1)]


def depth_groups(layers: Sequence[int], count: int) -> tuple[Override, ...]:
    """Return overrides that split the layers, in order, into ranges of about equal length.

    Example:
        >>> [override.layers for override in depth_groups(range(10), 3)]
        [(0, 2), (3, 5), (6, 9)]
        >>> [override.layers for override in depth_groups([4, 5, 8, 9], 2)]
        [(4, 5), (8, 9)]
    """
    ends = [len(layers) * number // count for number in range(count + 1)]
    return tuple(Override(layers=(layers[first], layers[last - 1])) for first, last in pairwise(ends))
