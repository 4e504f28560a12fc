"""Module paths of adapters that were trained on the same base model under different heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from .peft_format import AdapterSource, open_adapter


def prefix_between(inner: Iterable[str], outer: Iterable[str]) -> str | None:
    """Return what stands before the paths of one adapter in those of another, or None.

    An encoder alone has `encoder.layer.0...`; under a classification head the same module is `bert.encoder.layer.0...`.

    Args:
        inner: Paths without a prefix.
        outer: Paths that may have one.

    Example:
        >>> prefix_between(["encoder.layer.0.dense"], ["bert.encoder.layer.0.dense", "bert.encoder.layer.1.dense"])
        'bert.'
    """
    inside, outside = set(inner), set(outer)
    if not inside or not outside or inside & outside:
        return None
    some = min(inside)
    candidates = [path.removesuffix(some) for path in outside if path.endswith(f".{some}")]
    fitting = [prefix for prefix in candidates if all(prefix + path in outside for path in inside)]
    # Modules of one may be missing in the other, as above the layer of an alignment LoRA: then one prefix is enough.
    chosen = fitting or candidates
    return chosen[0] if len(set(chosen)) == 1 else None


def _renamed(source: AdapterSource, names: Mapping[str, str]) -> AdapterSource:
    return replace(
        source,
        modules={names[path]: header for path, header in source.modules.items()},
        parts={names[path]: parts for path, parts in source.parts.items()},
    )


def under(source: AdapterSource, prefix: str) -> AdapterSource:
    """Return an adapter with a prefix before all of its module paths."""
    return _renamed(source, {path: prefix + path for path in source.modules})


def without_prefix(source: AdapterSource, modules: Set[str]) -> AdapterSource:
    """Return an adapter that was trained under a head with the paths of the model alone; as it is if that fails.

    Args:
        source: The adapter.
        modules: Paths of all modules of the model.
    """
    some = min(source.modules, default="")
    for place in (number for number, sign in enumerate(some, start=1) if sign == "."):
        prefix = some[:place]
        if all(path.startswith(prefix) and path[place:] in modules for path in source.modules):
            return _renamed(source, {path: path[place:] for path in source.modules})
    return source


def fitted(source: AdapterSource, modules: Iterable[str]) -> AdapterSource:
    """Return an adapter with the paths that a model has; as it is where they agree, or where no prefix helps.

    Args:
        source: The adapter.
        modules: Paths of all modules of the model.
    """
    known = set(modules)
    prefix = prefix_between(source.modules, known)
    if prefix is not None:
        return under(source, prefix)
    return source if source.modules.keys() <= known else without_prefix(source, known)


def open_adapters(paths: Sequence[str | Path], *, allow_pickle: bool = False) -> tuple[AdapterSource, ...]:
    """Open adapters that are to act together; paths of encoders are brought under those of models with heads.

    Raises:
        AdapterFormatError: as `open_adapter`.
    """
    sources = [open_adapter(path, allow_pickle=allow_pickle) for path in paths]
    return tuple(_aligned(source, sources) for source in sources)


def _aligned(source: AdapterSource, others: Sequence[AdapterSource]) -> AdapterSource:
    found = {prefix_between(source.modules, other.modules) for other in others if other is not source} - {None}
    prefix = found.pop() if len(found) == 1 else None
    return source if prefix is None else under(source, prefix)
