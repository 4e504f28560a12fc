"""Weights and options that differ by place: globs over module paths, ranges of layers, curves over the depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ..errors import PlanError, UsageError
from .weights import resolve_weights

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_of(module: str) -> int | None:
    """Return the number of the block of a module, the first whole number in its path; None outside the blocks."""
    found = _NUMBER.search(module)
    return int(found[1]) if found and len(found[1]) < 9 else None


def stack_of(module: str) -> str | None:
    """Return the path of the stack that the block of a module is in; None outside the blocks.

    Example:
        >>> stack_of("vision.layers.3.q"), stack_of("score")
        ('vision.layers', None)
    """
    return None if layer_of(module) is None else module[: _NUMBER.search(module).start()]  # type: ignore[union-attr]


def depths_of(modules: Iterable[str]) -> dict[str, int]:
    """Return the number of blocks of each stack, up to the last that one of some modules lies in.

    An encoder and a decoder, or the two halves of a vision-language model, are stacks of their own.

    Example:
        >>> depths_of(["embed", "layers.0.q", "layers.5.q", "vision.layers.1.q"])
        {'layers': 6, 'vision.layers': 2}
    """
    found: dict[str, int] = {}
    for module in modules:
        stack, block = stack_of(module), layer_of(module)
        if stack is not None and block is not None:
            found[stack] = max(found.get(stack, 0), block + 1)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """What holds at some modules instead of everywhere.

    Args:
        modules: Glob over module paths.
        layers: First and last block, both included; None for any place.
        points: Weight vectors: none leaves the weights, one holds everywhere, several are a curve over the layers,
            evenly spaced and interpolated linearly.
        options: Options of the method.
    """

    modules: str = "*"
    layers: tuple[int, int] | None = None
    points: tuple[tuple[float, ...], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def covers(self, module: str) -> bool:
        """Return whether a module lies in the place."""
        if not fnmatchcase(module, self.modules):
            return False
        if self.layers is None:
            return True
        number = layer_of(module)
        return number is not None and self.layers[0] <= number <= self.layers[1]

    def weights(self, module: str) -> tuple[float, ...] | None:
        """Return the weights at a module, or None if the override leaves them."""
        if len(self.points) < 2:
            return self.points[0] if self.points else None
        number = layer_of(module)
        first, last = self.layers or (0, 0)
        if number is None:
            return None
        place = (number - first) / (last - first) * (len(self.points) - 1) if last > first else 0.0
        low = min(int(place), len(self.points) - 2)
        pairs = zip(self.points[low], self.points[low + 1], strict=True)
        return tuple(round((1 - (place - low)) * one + (place - low) * other, 12) for one, other in pairs)

    def entry(self) -> dict[str, Any]:
        """Return the override as plain data, for manifests."""
        found: dict[str, Any] = {"modules": self.modules}
        if self.layers:
            found["layers"] = f"{self.layers[0]}-{self.layers[1]}"
        if self.points:
            found["weights" if len(self.points) == 1 else "curve"] = (
                list(self.points[0]) if len(self.points) == 1 else [list(point) for point in self.points]
            )
        if self.options:
            found["options"] = dict(self.options)
        return found


def _numbers(value: Any, what: str) -> list[float]:
    """Return numbers from one number, a list of them, or text such as `0.8,0.2`."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{what} must be a number, or numbers parted by commas, got {value!r}.", code="override.numbers"
        ) from error


def _layers(text: str | int | None, modules: Sequence[str]) -> tuple[int, int] | None:
    if text is None:
        return None
    text = str(text)
    found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", text)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        if text.strip() in ("*", "all"):
            numbers = [n for n in map(layer_of, modules) if n is not None] or [0]
            return min(numbers), max(numbers)
        raise UsageError(
            f"layers must be FIRST-LAST, such as 0-15, one number, or all, got {text!r}.", code="override.layers"
        )
    return int(found[1]), int(found[2] or found[1])


def make_override(given: Mapping[str, Any], names: Sequence[str], modules: Sequence[str]) -> Override:
    """Return an override from a recipe's entry, checked against the adapters.

    Args:
        given: `modules` (glob), `layers` ("FIRST-LAST" or "all"), `weights` or `curve`, and `options`.
        names: Names of the adapters.
        modules: Paths of all modules.

    Raises:
        PlanError: no module lies in the place, or the weights do not fit the adapters.
    """
    covered = [module for module in modules if fnmatchcase(module, given.get("modules") or "*")]
    layers = _layers(given.get("layers"), covered)
    points: list[tuple[float, ...]] = []
    if given.get("weights") is not None:
        points = [resolve_weights(names, _numbers(given["weights"], "weights of a place"))]
    if given.get("curve") is not None:
        if points or not isinstance(given["curve"], list | tuple) or len(given["curve"]) < 2:
            raise UsageError(
                f"a curve must be a list of at least two weights, without 'weights', got {dict(given)}.",
                code="override.curve",
            )
        points = [resolve_weights(names, _numbers(point, "points of a curve")) for point in given["curve"]]
        layers = layers or _layers("all", covered)
    override = Override(
        modules=given.get("modules") or "*",
        layers=layers,
        points=tuple(points),
        options=dict(given.get("options") or {}),
    )
    if not any(override.covers(module) for module in modules):
        place = f"modules {override.modules!r}" + (f", layers {layers[0]}-{layers[1]}" if layers else "")
        raise PlanError(
            f"a place must hold at least one module, and none matches {place}; one is {modules[0]!r}"
            f"{_known_layers(modules)}.",
            code="override.no-module",
        )
    return override


def _known_layers(modules: Sequence[str]) -> str:
    numbers = [number for number in map(layer_of, modules) if number is not None]
    return f", and the layers are {min(numbers)}-{max(numbers)}" if numbers else ""


def split_settings(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Part `KEY=VALUE` settings into options of the method and places.

    `KEY@GLOB=VALUE`, `KEY@layers:FIRST-LAST=VALUE` and `KEY@layers:FIRST-LAST,GLOB=VALUE` hold at a place; KEY is
    `weights`, `curve` or an option of the method.
    """
    plain, places = {}, []
    for key, value in options.items():
        name, at, place = str(key).partition("@")
        if not at:
            plain[key] = value
            continue
        entry: dict[str, Any] = {}
        if place.startswith("layers:"):
            entry["layers"], _, place = place.removeprefix("layers:").partition(",")
        entry["modules"] = place or "*"
        entry |= {name: value} if name in ("weights", "curve") else {"options": {name: value}}
        places.append(entry)
    return plain, places
