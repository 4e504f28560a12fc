"""Loops of a recipe: `each` repeats steps for values of variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from ..io.limited_yaml import Filling, names_in, shortened
from ..io.yaml_lines import Faults, KeyPath

MOST_STEPS = 2000
"""Most steps of a recipe, with those of all passes of its loops."""
_KEYS = ("each", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry of `steps` that is a command, with its variables replaced.

    Args:
        content: The entry.
        written: Where it is in the file: the positions in the lists of steps, from 1. The passes of a loop share it.
        loop: The values of the loops around it, by variable.
    """

    content: object
    written: tuple[int, ...]
    loop: Mapping[str, object] = field(default_factory=dict)


def expand(steps: Sequence[object], variables: Mapping[str, object], faults: Faults) -> list[Entry]:
    """Return the steps of all passes of all loops, in the order in which they run.

    Args:
        steps: The list `steps` of a recipe. A loop is a mapping of `each` and `steps`. `each` is a mapping of
            variables to lists of values, for all combinations of these (the last variable changes fastest), or a list
            of mappings, one per pass.
        variables: The variables of the recipe, which may contain each other one level deep, and the loops' variables.
        faults: Errors are added here.
    """
    loops = _Loops(variables, faults)
    loops.names = loops.names_of(steps)
    loops.add(steps, variables, {}, (), {})
    return loops.entries


class _Loops:
    """Collects the entries of all loops of a recipe."""

    def __init__(self, variables: Mapping[str, object], faults: Faults) -> None:
        self.entries: list[Entry] = []
        self.names: set[str] = set()
        self._variables, self._faults = variables, faults
        self._filling = Filling({}, faults)

    def names_of(self, steps: Sequence[object]) -> set[str]:
        """Return the variables that the loops of a list set, at any depth."""
        names: set[str] = set()
        for entry in steps:
            if isinstance(entry, dict) and "each" in entry:
                each, inner = entry["each"], entry.get("steps")
                if isinstance(each, str):  # such as "${arms}", a variable with one mapping per pass
                    each = next((self._variables.get(name) for name in names_in(each)), None)
                mappings = each if isinstance(each, list) else [each]
                names |= {str(name) for mapping in mappings if isinstance(mapping, dict) for name in mapping}
                names |= self.names_of(inner) if isinstance(inner, list) else set()
        return names

    def add(
        self,
        steps: Sequence[object],
        scope: Mapping[str, object],
        known: Mapping[str, object],
        within: tuple[int, ...],
        loop: Mapping[str, object],
    ) -> None:
        """Add the entries of a list of steps.

        Args:
            steps: The list.
            scope: The variables there, as they are written.
            known: Those whose own variables are replaced already.
            within: Where the list is in the file.
            loop: The values of the loops around it.
        """
        outside = self.names - set(scope)
        unset = outside | {name for name, value in scope.items() if names_in(value) & outside}
        inner = self._filling.of({name: value for name, value in scope.items() if name not in unset})
        new = {name: inner(value) for name, value in scope.items() if name not in unset and name not in known}
        known = {**known, **new}
        fill = self._filling.of(known)
        for number, entry in enumerate(steps, start=1):
            written = (*within, number)
            loop_entry = entry if isinstance(entry, dict) and "each" in entry else None
            if wrong := sorted(names_in(loop_entry["each"] if loop_entry else entry) & unset):
                self._faults.at(
                    key_path_of(written),
                    f"{_position(written)}: ${{{wrong[0]}}} has a value only in the steps of the loop that sets "
                    f"{', '.join(sorted(outside))}.",
                )
            elif loop_entry:
                self._add_loop(loop_entry, scope, known, written, loop)
            elif len(self.entries) < MOST_STEPS:
                self.entries.append(Entry(content=fill(entry), written=written, loop=loop))
            else:
                self._faults.at((), f"a recipe may have at most {MOST_STEPS:,} steps with all passes of its loops.")

    def _add_loop(
        self,
        entry: Mapping[str, object],
        scope: Mapping[str, object],
        known: Mapping[str, object],
        written: tuple[int, ...],
        loop: Mapping[str, object],
    ) -> None:
        steps = entry.get("steps")
        if set(entry) != set(_KEYS) or not isinstance(steps, list) or not steps:
            keys = ", ".join(map(str, entry))
            self._faults.at(
                key_path_of(written),
                f"{_position(written)}: a loop must have 'each' and a list 'steps' of at least one step, found {keys}.",
            )
            return
        try:
            passes = _passes(self._filling.of(known)(entry["each"]))
        except ValueError as error:
            self._faults.at((*key_path_of(written), "each"), f"{_position(written)}: {error}")
            return
        if twice := sorted({name for values in passes for name in values} & set(scope)):
            self._faults.at(
                (*key_path_of(written), "each"),
                f"{_position(written)}: each must set new variables, and {twice[0]!r} is a variable already. Give it "
                "another name.",
            )
            return
        for values in passes:
            self.add(steps, {**scope, **values}, {**known, **values}, written, {**loop, **values})


def key_path_of(written: tuple[int, ...]) -> KeyPath:
    """Return the place in the file of an entry, see `Entry.written`."""
    return [part for number in written for part in ("steps", number - 1)]


def _position(written: tuple[int, ...]) -> str:
    """Return the position of an entry in the file, such as `step 3.1` for the first step of a loop."""
    return f"step {'.'.join(map(str, written))}"


def _passes(each: object) -> list[dict[str, object]]:
    """Return the values of each pass of a loop.

    Raises:
        ValueError: `each` has another form, or asks for too many passes.
    """
    example = "{layer: [8, 16]}, or a list of mappings, one per pass"
    if isinstance(each, list):
        if not each or not all(isinstance(values, dict) and values for values in each):
            raise ValueError(f"each must be a mapping such as {example}, found {shortened(each)}.")
        _check_names([name for values in each for name in values])
        return [dict(values) for values in each]
    if not isinstance(each, dict) or not each:
        raise ValueError(f"each must be a mapping such as {example}, found {shortened(each)}.")
    _check_names(each)
    for name, values in each.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"each: {name} must be a list of at least one value, found {shortened(values)}.")
    if (count := prod(map(len, each.values()))) > MOST_STEPS:
        raise ValueError(f"each must have at most {MOST_STEPS:,} passes, found {count:,}.")
    return [dict(zip(each, values, strict=True)) for values in product(*each.values())]


def _check_names(names: Sequence[object] | Mapping[object, object]) -> None:
    for name in names:
        if not isinstance(name, str) or names_in(f"${{{name}}}") != {name}:
            raise ValueError(f"each: a variable must be named with letters, digits and _, found {shortened(name)}.")
