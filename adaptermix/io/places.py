"""Lines of a YAML file, for messages about its content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

Place = Sequence[str | int]
"""Keys and positions (from 0) from the top of a document, such as ("steps", 2, "merge", "weights")."""


class Faults(list[str]):
    """Faults of a YAML file, each a sentence, and their places in it."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[str, Place | str] = {}

    def at(self, place: Place | str, fault: str) -> None:
        """Add a fault, once.

        Args:
            place: Its place, or a text in it, such as `${name}`.
            fault: The sentence.
        """
        if fault not in self:
            self.append(fault)
            self._places[fault] = place

    def with_lines(self, path: Path) -> list[str]:
        """Return the faults in the order of the file, each with its line where the place is known."""
        try:
            top = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, ValueError, yaml.YAMLError):  # another process has just changed the file
            top = None
        found = [(_line(top, self._places.get(fault, ())), fault) for fault in self]
        found.sort(key=lambda item: item[0])
        return [f"line {line}: {fault}" if line else fault for line, fault in found]


def _line(top: yaml.Node | None, place: Place | str) -> int:
    """Return the line of a place, from 1, or of the deepest part of it that exists; 0 without one."""
    if top is None or not place:
        return 0
    if isinstance(place, str):
        return _line_of_text(top, place)
    node, line = top, 0
    for part in place:
        if isinstance(node, yaml.MappingNode):
            pairs = [pair for pair in node.value if pair[0].value == part]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _line_of_text(top: yaml.Node, text: str) -> int:
    """Return the line of the first scalar that contains a text."""
    waiting, seen = [top], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            if text in node.value:
                return node.start_mark.line + 1
            continue
        children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        waiting += reversed(children)
    return 0
