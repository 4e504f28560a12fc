"""What is searched: weights of adapters, over the whole model or by place, and options of the merge method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import sqrt
from typing import Any

from ..merging.overrides import Override

_DIGITS = 3
"""Of weights: what is found can be typed again, and near points are one candidate."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number from `low` to `high`, both included.

    Args:
        low: Lower end.
        high: Upper end.
        log: Whether equal ratios count alike, not equal differences; `low` is above 0 then.
        whole: Whether it is a whole number.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.low}:{self.high}" + ":log" * self.log

    @property
    def middle(self) -> float:
        """Return what lies halfway.

        Example:
            >>> Interval(1, 100, log=True, whole=True).middle, Interval(0.0, 1.0).middle
            (10, 0.5)
        """
        found = sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(found) if self.whole else found


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Parameter = Interval | Choice
Point = Mapping[str, Any]
"""A value per parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a trial merges.

    Args:
        weights: One per adapter; where they differ by place, their mean over the places.
        overrides: What holds at the places.
        options: Options of the method that were searched.
        name: What a person knows it by, where it is a merge that was there before.
    """

    weights: tuple[float, ...]
    overrides: tuple[Override, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        document: dict[str, Any] = {"weights": list(self.weights)}
        if self.overrides:
            document["places"] = [override.entry() for override in self.overrides]
        if self.options:
            document["options"] = dict(self.options)
        if self.name:
            document["name"] = self.name
        return document

    @property
    def distance(self) -> float:
        """Return how far the weights are from the first adapter alone: sum of |w - (1, 0, ...)|, mean over places."""
        vectors = [point for override in self.overrides for point in override.points] or [self.weights]
        alone = _alone(len(self.weights))
        gaps = [sum(abs(w - a) for w, a in zip(vector, alone, strict=True)) for vector in vectors]
        return sum(gaps) / len(gaps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    r"""Weights of k adapters and options of a method, as independent parameters.

    On the simplex, where weights are not negative and sum to 1, there are k - 1 parameters $u_i \in [0, 1]$ per place,
    $w_i = r_i (1 - (1 - u_i)^{1/(k - 1 - i)})$ with $r_i$ what the earlier weights have left, so that uniform
    parameters give uniform weights; for two adapters $u_0$ is the first one's weight. Free weights are parameters
    themselves.

    Args:
        count: Number of adapters, k.
        simplex: Whether weights sum to 1.
        reach: Least and largest free weight; where both are one number, all weights are that and no parameters.
        places: Places that have weights of their own; they cover all modules. None: one for the whole model.
        idle: For each place the numbers of the adapters that adapt no module there. Free weights of theirs are 0 and
            no parameters, since they would change nothing.
        knots: Weight vectors per place, 1, or more for a curve over the layers.
        options: Options of the method.
    """

    count: int
    simplex: bool = True
    reach: tuple[float, float] = (0.0, 1.5)
    places: tuple[Override, ...] = ()
    idle: tuple[frozenset[int], ...] = ()
    knots: int = 1
    options: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Return the parameters by name."""
        if self._is_fixed:
            return dict(self.options)
        bounds = Interval(0.0, 1.0) if self.simplex else Interval(*self.reach)
        per_vector = self.count - 1 if self.simplex else self.count
        weights = {
            f"{slot}w{i}": bounds
            for number, slot in enumerate(self._slots())
            for i in range(per_vector)
            if i not in self._idle_at(number)
        }
        return weights | dict(self.options)

    @property
    def _is_fixed(self) -> bool:
        return not self.simplex and self.reach[0] == self.reach[1]

    def _idle_at(self, number: int) -> frozenset[int]:
        """Return the adapters whose free weight changes nothing in the weight vector of this number."""
        return frozenset() if self.simplex or not self.idle else self.idle[number // self.knots]

    def _slots(self) -> list[str]:
        """Return a prefix per weight vector."""
        if not self.places:
            return [""]
        return [f"place{p}.{k}." for p in range(len(self.places)) for k in range(self.knots)]

    def candidate(self, point: Point) -> Candidate:
        """Return what a point stands for."""
        vectors = [self._weights(point, slot) for slot in self._slots()]
        options = {name: point[name] for name in self.options}
        mean = tuple(round(sum(column) / len(vectors), _DIGITS) for column in zip(*vectors, strict=True))
        overrides = tuple(
            Override(
                modules=place.modules,
                layers=place.layers,
                points=tuple(vectors[number * self.knots : (number + 1) * self.knots]),
            )
            for number, place in enumerate(self.places)
        )
        return Candidate(weights=mean, overrides=overrides, options=options)

    def _weights(self, point: Point, slot: str) -> tuple[float, ...]:
        if not self.simplex:
            missing = self.reach[0] if self._is_fixed else 0.0
            return tuple(round(float(point.get(f"{slot}w{i}", missing)), _DIGITS) for i in range(self.count))
        left, found = 1.0, []
        for i in range(self.count - 1):
            share = 1 - (1 - float(point[f"{slot}w{i}"])) ** (1 / (self.count - 1 - i))
            found.append(round(left * share, _DIGITS))
            left -= found[-1]
        return (*found, round(left, _DIGITS))

    def point(self, weights: Sequence[float], options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the point of weights that hold everywhere, or None if they do not lie in the space."""
        if self.simplex and (min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
            return None
        if not self.simplex and not all(self.reach[0] <= weight <= self.reach[1] for weight in weights):
            return None
        vector = self._shares(weights) if self.simplex else list(map(float, weights))
        named = {f"{slot}w{i}": value for slot in self._slots() for i, value in enumerate(vector)}
        return {key: value for key, value in named.items() if key in self.parameters} | dict(options)

    def _shares(self, weights: Sequence[float]) -> list[float]:
        left, found = 1.0, []
        for i, weight in enumerate(weights[:-1]):
            share = min(1.0, weight / left) if left > 1e-9 else 1.0
            found.append(1 - (1 - share) ** (self.count - 1 - i))
            left -= weight
        return found

    def starts(self) -> list[tuple[float, ...]]:
        """Return the weights that are tried first: 0.9 of the first adapter, all alike; free ones also as sums."""
        if self.count == 1:
            return [] if self.simplex else [(1.0,)]
        others = self.count - 1
        starts = [(0.9, *[0.1 / others] * others), tuple([1 / self.count] * self.count)]
        return starts if self.simplex else [*starts, (1.0, *[0.5] * others), (1.0, *[1.0] * others)]


def _alone(count: int) -> tuple[float, ...]:
    return (1.0, *[0.0] * (count - 1))


def alone(count: int) -> Candidate:
    """Return the first adapter alone, against which every candidate is held."""
    return Candidate(weights=_alone(count))


def grid_weights(grid: Sequence[float], count: int, *, simplex: bool) -> list[tuple[float, ...]]:
    """Return the weights of a grid, in order.

    On the simplex the last adapter gets what the others leave, and nothing below 0 but for pairs, where (1.2, -0.2) is
    what was asked for.

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
    """Return places that part layers, in order, into ranges of as equal numbers of them as may be.

    Example:
        >>> [place.layers for place in depth_groups(range(10), 3)]
        [(0, 2), (3, 5), (6, 9)]
        >>> [place.layers for place in depth_groups([4, 5, 8, 9], 2)]
        [(4, 5), (8, 9)]
    """
    ends = [len(layers) * number // count for number in range(count + 1)]
    return tuple(Override(layers=(layers[first], layers[last - 1])) for first, last in pairwise(ends))
