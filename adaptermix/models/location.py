"""The location of modules in a model, computed from their paths: the block's number, and the kind of module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

OUTSIDE = "outside"
"""Layer of modules that are not in a block: embeddings, heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLocation:
    """Location of a module.

    Args:
        layer: Number of its block, the first whole number in the path ("7"). In a model with several stacks it starts
            with the stack's name ("encoder.7"). OUTSIDE for modules that are not in a block.
        kind: Last part of the path ("q_proj"), or as many of the last parts as make it unique in a block
            ("attention.output.dense"). Numbers inside a block (experts) do not count.
        order: Sort key of layers: stack, then number; OUTSIDE last.
    """

    layer: str
    kind: str
    order: tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    stack: str
    number: int | None
    inner: tuple[str, ...]


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _split(path: str) -> _Parts:
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if _is_number(part)), None)
    if first is None:
        return _Parts(stack="", number=None, inner=tuple(parts))
    inner = [part for part in parts[first + 1 :] if not _is_number(part)]
    # The block itself is the module, as in nn.Sequential.
    inner = inner or [part for part in parts if not _is_number(part)][-1:] or [path]
    return _Parts(stack=".".join(parts[:first]), number=int(parts[first]), inner=tuple(inner))


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """Return the number of leading parts that all lists share."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*lists, strict=False)))


def _stack_names(stacks: Iterable[str]) -> dict[str, str]:
    """Return a name per stack: empty for a single one, `encoder` and `decoder` for a translation model."""
    split = {stack: stack.split(".") for stack in stacks}
    if len(split) < 2:
        return dict.fromkeys(split, "")
    front = _shared(list(split.values()))
    back = _shared([parts[front:][::-1] for parts in split.values()])
    names = {stack: ".".join(parts[front : len(parts) - back]) for stack, parts in split.items()}
    return names if all(names.values()) else dict(zip(split, split, strict=True))


def _kinds(inners: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return the shortest suffix of each path that no other path has, or the whole path."""
    paths = set(inners)
    owners: dict[tuple[str, ...], int] = {}
    for path in paths:
        for length in range(1, len(path) + 1):
            owners[path[-length:]] = owners.get(path[-length:], 0) + 1
    return {
        path: ".".join(next((path[-n:] for n in range(1, len(path) + 1) if owners[path[-n:]] == 1), path))
        for path in paths
    }


def locations(paths: Iterable[str]) -> dict[str, ModuleLocation]:
    """Return the location of each module, in the order of the model: by stack and block, those outside the blocks last.

    Example:
        >>> by_path = locations(["model.layers.3.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head"])
        >>> [(location.layer, location.kind) for location in by_path.values()]
        [('3', 'q_proj'), ('10', 'up_proj'), ('outside', 'lm_head')]
    """
    parts = {path: _split(path) for path in paths}
    stacks = _stack_names(dict.fromkeys(p.stack for p in parts.values() if p.number is not None))
    kinds = _kinds(p.inner for p in parts.values())
    located = {}
    for path, part in parts.items():
        if part.number is None:
            layer, order = OUTSIDE, ("\U0010ffff", 0)
        else:
            name = stacks[part.stack]
            layer, order = (f"{name}.{part.number}" if name else str(part.number)), (name, part.number)
        located[path] = ModuleLocation(layer=layer, kind=kinds[part.inner], order=order)
    return dict(sorted(located.items(), key=lambda item: item[1].order))


def layers_of(located: Mapping[str, ModuleLocation]) -> dict[str, tuple[str, ...]]:
    """Return the modules of each layer, in the order of the model."""
    return _grouped({path: location.layer for path, location in located.items()})


def kinds_of(located: Mapping[str, ModuleLocation]) -> dict[str, tuple[str, ...]]:
    """Return the modules of each kind, in order of first appearance."""
    return _grouped({path: location.kind for path, location in located.items()})


def _grouped(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for path, name in names.items():
        groups.setdefault(name, []).append(path)
    return {name: tuple(members) for name, members in groups.items()}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None for an empty group."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def unique_names(names: Sequence[str]) -> list[str]:
    """Return names that differ: the second `task` becomes `task#2`.

    Example:
        >>> unique_names(["task", "align", "task", "task"])
        ['task', 'align', 'task#2', 'task#3']
    """
    taken, result = set(names), []
    seen: set[str] = set()
    for name in names:
        candidate, count = name, 1
        while candidate in seen or (count > 1 and candidate in taken):
            count += 1
            candidate = f"{name}#{count}"
        seen.add(candidate)
        result.append(candidate)
    return result
