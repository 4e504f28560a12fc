"""Weights and options for some modules only: globs over module paths, ranges of layers, curves over the depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ..errors import PlanError, UsageError
from ..io.json_types import JsonObject
from .weights import resolve_weights

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_of(module: str) -> int | None:
    """Return the number of the block of a module, the first whole number in its path; None outside the blocks."""
    match = _NUMBER.search(module)
    return int(match[1]) if match and len(match[1]) < 9 else None


def stack_of(module: str) -> str | None:
    """Return the path of the stack that the block of a module belongs to; None outside the blocks.

    Example:
        >>> stack_of("vision.layers.3.q"), stack_of("score")
        ('vision.layers', None)
    """
    return None if layer_of(module) is None else module[: _NUMBER.search(module).start()]  # type: ignore[union-attr]


def depths_of(modules: Iterable[str]) -> dict[str, int]:
    """Return the number of blocks of each stack: one more than the highest block of these modules.

    The encoder and the decoder of a model are separate stacks, also those of vision-language models.

    Example:
        >>> depths_of(["embed", "layers.0.q", "layers.5.q", "vision.layers.1.q"])
        {'layers': 6, 'vision.layers': 2}
    """
    depths: dict[str, int] = {}
    for module in modules:
        stack, block = stack_of(module), layer_of(module)
        if stack is not None and block is not None:
            depths[stack] = max(depths.get(stack, 0), block + 1)
    return depths


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Weights and options of some modules.

    Args:
        modules: Glob over module paths.
        layers: First and last block, both included; None for every block.
        points: Weight vectors: no vector keeps the weights, one applies to every module, several are a curve over the
            layers, evenly spaced and interpolated linearly.
        options: Options of the method.
    """

    modules: str = "*"
    layers: tuple[int, int] | None = None
    points: tuple[tuple[float, ...], ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)

    def covers(self, module: str) -> bool:
        """Return whether the override applies to a module."""
        if not fnmatchcase(module, self.modules):
            return False
        if self.layers is None:
            return True
        number = layer_of(module)
        return number is not None and self.layers[0] <= number <= self.layers[1]

    def weights(self, module: str) -> tuple[float, ...] | None:
        """Return the weights at a module, or None if the override does not change them."""
        if len(self.points) < 2:
            return self.points[0] if self.points else None
        number = layer_of(module)
        first, last = self.layers or (0, 0)
        if number is None:
            return None
        position = (number - first) / (last - first) * (len(self.points) - 1) if last > first else 0.0
        low = min(int(position), len(self.points) - 2)
        pairs = zip(self.points[low], self.points[low + 1], strict=True)
        return tuple(round((1 - (position - low)) * one + (position - low) * other, 12) for one, other in pairs)

    def entry(self) -> JsonObject:
        """Return the override as plain data, for manifests."""
        entry: JsonObject = {"modules": self.modules}
        if self.layers:
            entry["layers"] = f"{self.layers[0]}-{self.layers[1]}"
        if self.points:
            entry["weights" if len(self.points) == 1 else "curve"] = (
                list(self.points[0]) if len(self.points) == 1 else [list(point) for point in self.points]
            )
        if self.options:
            entry["options"] = dict(self.options)
        return entry


def _numbers(value: Any, what: str) -> list[float]:
    """Return numbers from one number, a list of them, or text such as `0.8,0.2`."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{what} must be a number, or numbers separated by commas, got {value!r}.", code="override.numbers"
        ) from error


def _layers(text: object, modules: Sequence[str]) -> tuple[int, int] | None:
    if text is None:
        return None
    text = str(text)
    match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        if text.strip() in ("*", "all"):
            numbers = [n for n in map(layer_of, modules) if n is not None] or [0]
            return min(numbers), max(numbers)
        raise UsageError(
            f"layers must be FIRST-LAST, such as 0-15, one number, or all, got {text!r}.", code="override.layers"
        )
    return int(match[1]), int(match[2] or match[1])


def make_override(entry: Mapping[str, object], names: Sequence[str], modules: Sequence[str]) -> Override:
    """Return an override from a recipe's entry, checked against the adapters.

    Args:
        entry: `modules` (glob), `layers` ("FIRST-LAST" or "all"), `weights` or `curve`, and `options`.
        names: Names of the adapters.
        modules: Paths of all modules.

    Raises:
        PlanError: the override matches no module, or the weights do not fit the adapters.
    """
    pattern, options = str(entry.get("modules") or "*"), entry.get("options") or {}
    covered = [module for module in modules if fnmatchcase(module, pattern)]
    layers = _layers(entry.get("layers"), covered)
    points: list[tuple[float, ...]] = []
    if entry.get("weights") is not None:
        points = [resolve_weights(names, _numbers(entry["weights"], "weights of an override"))]
    curve = entry.get("curve")
    if curve is not None:
        if points or not isinstance(curve, list | tuple) or len(curve) < 2:
            raise UsageError(
                f"a curve must be a list of at least two weights, without 'weights', got {dict(entry)}.",
                code="override.curve",
            )
        points = [resolve_weights(names, _numbers(point, "points of a curve")) for point in curve]
        layers = layers or _layers("all", covered)
    if not isinstance(options, Mapping):
        raise UsageError(f"options of an override must be KEY: VALUE pairs, got {options!r}.", code="override.options")
    override = Override(modules=pattern, layers=layers, points=tuple(points), options=dict(options))
    if not any(override.covers(module) for module in modules):
        where = f"modules {pattern!r}" + (f", layers {layers[0]}-{layers[1]}" if layers else "")
        raise PlanError(
            f"an override must match at least one module, but no module matches {where}; one is {modules[0]!r}"
            f"{_known_layers(modules)}.",
            code="override.no-module",
        )
    return override


def _known_layers(modules: Sequence[str]) -> str:
    numbers = [number for number in map(layer_of, modules) if number is not None]
    return f", and the layers are {min(numbers)}-{max(numbers)}" if numbers else ""


def split_settings(options: Mapping[str, object]) -> tuple[JsonObject, list[JsonObject]]:
    """Split `KEY=VALUE` settings into options of the method and overrides.

    `KEY@GLOB=VALUE`, `KEY@layers:FIRST-LAST=VALUE` and `KEY@layers:FIRST-LAST,GLOB=VALUE` are overrides; KEY is
    `weights`, `curve` or an option of the method.
    """
    plain, overrides = {}, []
    for key, value in options.items():
        name, at, pattern = str(key).partition("@")
        if not at:
            plain[key] = value
            continue
        entry: JsonObject = {}
        if pattern.startswith("layers:"):
            entry["layers"], _, pattern = pattern.removeprefix("layers:").partition(",")
        entry["modules"] = pattern or "*"
        entry |= {name: value} if name in ("weights", "curve") else {"options": {name: value}}
        overrides.append(entry)
    return plain, overrides
