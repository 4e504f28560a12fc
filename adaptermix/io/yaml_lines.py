"""Lines of a YAML file, for messages about its content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

KeyPath = Sequence[str | int]
"""Keys and positions (from 0) from the top of a document, such as ("steps", 2, "merge", "weights")."""


class Faults(list[str]):
    """Faults of a YAML file, each a sentence, and the keys that lead to them."""

    def __init__(self) -> None:
        super().__init__()
        self._paths: dict[str, KeyPath | str] = {}

    def at(self, path: KeyPath | str, fault: str) -> None:
        """Add a fault, once.

        Args:
            path: The keys that lead to it, or a text in it, such as `${name}`.
            fault: The sentence.
        """
        if fault not in self:
            self.append(fault)
            self._paths[fault] = path

    def with_lines(self, file: Path) -> list[str]:
        """Return the faults in the order of the file, each with its line where that is known."""
        try:
            top = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, ValueError, yaml.YAMLError):  # another process has just changed the file
            top = None
        lines = [(_line(top, self._paths.get(fault, ())), fault) for fault in self]
        lines.sort(key=lambda item: item[0])
        return [f"line {line}: {fault}" if line else fault for line, fault in lines]


def _line(top: yaml.Node | None, path: KeyPath | str) -> int:
    """Return the line of a value, from 1, or of the last key of its path that exists; 0 without one."""
    if top is None or not path:
        return 0
    if isinstance(path, str):
        return _line_of_text(top, path)
    node, line = top, 0
    for part in path:
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
