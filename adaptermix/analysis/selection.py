"""Which modules a person means: by layers, by globs, inside the blocks unless asked for more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from ..errors import PlanError, did_you_mean
from ..models.location import OUTSIDE, Place

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def _is_layer(pattern: str, place: Place) -> bool:
    """Whether a layer is meant: by its number, a range of numbers, or a glob over its label."""
    found = _RANGE.fullmatch(pattern)
    if found is None:
        return fnmatchcase(place.layer, pattern)
    if place.layer == OUTSIDE:
        return False
    first, last = int(found[1]), int(found[2] or found[1])
    return first <= place.order[1] <= last


def _is_module(pattern: str, path: str, place: Place) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(place.kind, pattern)


def select(
    found: Mapping[str, Place],
    *,
    layers: Sequence[str] = (),
    modules: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Return the modules meant, in the order given.

    Args:
        found: All modules with their places.
        layers: Numbers ("3"), ranges with both ends ("8-11"), or globs over layer labels ("encoder.*"); none means all.
        modules: Globs over whole paths or kinds ("q_proj", "*.mlp.*"), inside the blocks; none means all.
        include: Globs of modules to take besides, also from outside the blocks (embeddings, heads).
        exclude: Globs of modules to leave out.

    Raises:
        PlanError: a pattern meets no module.
    """
    kinds = sorted({place.kind for place in found.values()})
    labels = list(dict.fromkeys(place.layer for place in found.values()))
    for pattern in layers:
        if not any(_is_layer(pattern, place) for place in found.values()):
            raise PlanError(f"--layers {pattern!r} must meet a layer. Layers here: {_few(labels)}.")
    for option, patterns in (("modules", modules), ("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_is_module(pattern, path, place) for path, place in found.items()):
                hint = did_you_mean(pattern, kinds)
                raise PlanError(f"--{option} {pattern!r} must meet a module.{hint} Kinds here: {_few(kinds)}.")

    def met(patterns: Sequence[str], path: str) -> bool:
        return any(_is_module(pattern, path, found[path]) for pattern in patterns)

    def chosen(path: str, place: Place) -> bool:
        inside = place.layer != OUTSIDE or any(_is_layer(pattern, place) for pattern in layers)
        of_layers = not layers or any(_is_layer(pattern, place) for pattern in layers)
        return (inside and of_layers and (not modules or met(modules, path))) or met(include, path)

    return [path for path, place in found.items() if chosen(path, place) and not met(exclude, path)]


def _few(names: Sequence[str]) -> str:
    """First names of a list, for messages."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def match_names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Return which of their modules each of ours is: the same path, or the only one that differs by a prefix.

    The same weights are `layers.0.q_proj` in a bare model and `model.layers.0.q_proj` under a head.

    Example:
        >>> match_names(["layers.0.q", "layers.1.q"], ["model.layers.0.q"])
        {'layers.0.q': 'model.layers.0.q'}
    """
    ours, theirs = list(ours), list(theirs)
    found = {path: path for path in ours if path in set(theirs)}
    left, right = ([path for path in side if path not in found] for side in (ours, theirs))
    of_left, of_right = _relatives(left, right), _relatives(right, left)
    for path in left:
        if len(of_left[path]) == 1 and of_right[of_left[path][0]] == [path]:
            found[path] = of_left[path][0]
    return {path: found[path] for path in ours if path in found}


def _relatives(paths: Sequence[str], others: Sequence[str]) -> dict[str, list[str]]:
    """Return, per path, the others that are it with a prefix, or that it is with a prefix."""
    endings: dict[str, list[str]] = {}
    for other in others:
        for suffix in _suffixes(other):
            endings.setdefault(suffix, []).append(other)
    known = set(others)
    return {path: [*endings.get(path, ()), *(s for s in _suffixes(path) if s in known)] for path in paths}


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
