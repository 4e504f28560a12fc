"""Selection of modules by layers and globs, inside the blocks by default."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypedDict

from ..errors import PlanError, did_you_mean
from ..models.location import OUTSIDE, ModuleLocation

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def _is_layer(pattern: str, location: ModuleLocation) -> bool:
    """Return whether a pattern selects a layer: by its number, a range of numbers, or a glob over its label."""
    match = _RANGE.fullmatch(pattern)
    if match is None:
        return fnmatchcase(location.layer, pattern)
    if location.layer == OUTSIDE:
        return False
    first, last = int(match[1]), int(match[2] or match[1])
    return first <= location.order[1] <= last


def _is_module(pattern: str, path: str, location: ModuleLocation) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(location.kind, pattern)


class Globs(TypedDict, total=False):
    """Keyword arguments of `select`."""

    layers: Sequence[str]
    modules: Sequence[str]
    include: Sequence[str]
    exclude: Sequence[str]


def select(
    located: Mapping[str, ModuleLocation],
    *,
    layers: Sequence[str] = (),
    modules: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Return the selected modules, in the order of `located`.

    Args:
        located: All modules with their locations.
        layers: Numbers ("3"), ranges with both ends ("8-11"), or globs over layer labels ("encoder.*"); default all.
        modules: Globs over whole paths or kinds ("q_proj", "*.mlp.*"), inside the blocks; default all.
        include: Globs of additional modules, including those outside the blocks (embeddings, heads).
        exclude: Globs of modules to leave out.

    Raises:
        PlanError: a pattern matches no module.
    """
    kinds = sorted({location.kind for location in located.values()})
    labels = list(dict.fromkeys(location.layer for location in located.values()))
    for pattern in layers:
        if not any(_is_layer(pattern, location) for location in located.values()):
            raise PlanError(
                f"--layers {pattern!r} must match a layer. Layers here: {_few(labels)}.", code="selection.no-layer"
            )
    for option, patterns in (("modules", modules), ("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_is_module(pattern, path, location) for path, location in located.items()):
                hint = did_you_mean(pattern, kinds)
                raise PlanError(
                    f"--{option} {pattern!r} must match a module.{hint} Kinds here: {_few(kinds)}.",
                    code="selection.no-module",
                )

    def matches(patterns: Sequence[str], path: str) -> bool:
        return any(_is_module(pattern, path, located[path]) for pattern in patterns)

    def chosen(path: str, location: ModuleLocation) -> bool:
        inside = location.layer != OUTSIDE or any(_is_layer(pattern, location) for pattern in layers)
        of_layers = not layers or any(_is_layer(pattern, location) for pattern in layers)
        return (inside and of_layers and (not modules or matches(modules, path))) or matches(include, path)

    return [path for path, location in located.items() if chosen(path, location) and not matches(exclude, path)]


def _few(names: Sequence[str]) -> str:
    """Return the first names of a list, for messages."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def match_names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Match the modules of two models: by equal paths, or by paths that differ only by a prefix, if these are unique.

    The same weights are `layers.0.q_proj` in a bare model and `model.layers.0.q_proj` under a head.

    Example:
        >>> match_names(["layers.0.q", "layers.1.q"], ["model.layers.0.q"])
        {'layers.0.q': 'model.layers.0.q'}
    """
    ours, theirs = list(ours), list(theirs)
    matches = {path: path for path in ours if path in set(theirs)}
    left, right = ([path for path in side if path not in matches] for side in (ours, theirs))
    of_left, of_right = _relatives(left, right), _relatives(right, left)
    for path in left:
        if len(of_left[path]) == 1 and of_right[of_left[path][0]] == [path]:
            matches[path] = of_left[path][0]
    return {path: matches[path] for path in ours if path in matches}


def _relatives(paths: Sequence[str], others: Sequence[str]) -> dict[str, list[str]]:
    """Return for each path the others that differ from it only by a prefix, of the path or of the other."""
    endings: dict[str, list[str]] = {}
    for other in others:
        for suffix in _suffixes(other):
            endings.setdefault(suffix, []).append(other)
    known = set(others)
    return {path: [*endings.get(path, ()), *(s for s in _suffixes(path) if s in known)] for path in paths}


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
