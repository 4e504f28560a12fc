"""PEFT's `rank_pattern` and `alpha_pattern`: which value is a module's own, in bounded time.

PEFT takes the first key that matches the end of a module path as a regular expression. A hostile or careless key such
as `(a+)+` makes a backtracking matcher run for ever, and a file with one key per module makes modules times keys
matches. So keys that are plain paths are looked up, and the rest are matched by the set of positions that can be
reached (Thompson, 1968), which has no backtracking. Both decide exactly what PEFT decides.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import AdapterFormatError

MAX_LENGTH = 1000
MAX_GENERAL = 32
_MAX_PATTERN = 10_000
_MAX_DEPTH = 8
_MAX_COPIES = 64
_MAX_NODES = 2000
_MAX_LOOKAHEADS = 8


@dataclass(frozen=True, slots=True)
class Node:
    """A piece of a regular expression.

    Args:
        kind: "one" character, "start", "end", "any of" the parts, "all of" them one after another, "repeat" the only
            one, the "edge" or the "inside" of a word, or the only part must match "ahead" or "not ahead".
        text: The expression of the one character.
        parts: The pieces it is made of.
        least: Least number of repetitions.
        most: Most, or None for any.
    """

    kind: str
    text: str = ""
    parts: tuple[Node, ...] = ()
    least: int = 1
    most: int | None = 1

    @property
    def nesting(self) -> int:
        """Largest number of nested repetitions."""
        return (self.kind == "repeat") + max((part.nesting for part in self.parts), default=0)

    @property
    def size(self) -> int:
        """Pieces, repeated ones counted each time."""
        return (1 + sum(part.size for part in self.parts)) * max(1, self.least, self.most or 0)


class _Parser:
    """Recursive descent over the regular part of Python's syntax; the rest is refused."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth, self.lookaheads = text, 0, 0, 0

    def parse(self) -> Node:
        node = self._choice()
        if self.at < len(self.text):
            raise ValueError("unbalanced parenthesis")
        return node

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _choice(self) -> Node:
        options = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            options.append(self._sequence())
        return Node("any of", parts=tuple(options)) if len(options) > 1 else options[0]

    def _sequence(self) -> Node:
        items: list[Node] = []
        while self._peek() and self._peek() not in "|)":
            items.append(self._repeat(self._atom()))
        return Node("all of", parts=tuple(items))

    def _atom(self) -> Node:
        start, sign = self.at, self._peek()
        self.at += 1
        if sign == "(":
            return self._group()
        if sign in "^$":
            return Node("start" if sign == "^" else "end")
        if sign == "[":
            self._skip_class()
        elif sign == "\\" and self._peek() in ("b", "B"):
            self.at += 1
            return Node("edge" if self.text[self.at - 1] == "b" else "inside")
        elif sign == "\\":
            if not re.match(r"[dDwWsS]|[^A-Za-z0-9]", self._peek()):
                raise ValueError(f"the escape \\{self._peek()} is not handled")
            self.at += 1
        return Node("one", self.text[start : self.at])

    def _group(self) -> Node:
        kind = ""
        if self._peek() == "?":
            opening = re.compile(r"\?(:|=|!|P<\w+>)").match(self.text, self.at)
            if opening is None:
                raise ValueError(f"groups of the form ({self.text[self.at : self.at + 3]}...) are not handled")
            kind = {"=": "ahead", "!": "not ahead"}.get(opening[1], "")
            self.at = opening.end()
            self.lookaheads += bool(kind)
        self.depth += 1
        if self.depth > _MAX_DEPTH or self.lookaheads > _MAX_LOOKAHEADS:
            raise ValueError(
                f"groups are nested more than {_MAX_DEPTH} deep, or more than {_MAX_LOOKAHEADS} look ahead"
            )
        node = self._choice()
        self.at += 1  # the closing bracket, which is there since the whole compiles
        self.depth -= 1
        if kind and node.nesting > 1:  # it is tried at every position
            raise ValueError("repetitions in repetitions are not handled where a group looks ahead")
        return Node(kind, parts=(node,)) if kind else node

    def _skip_class(self) -> None:
        self.at += 1 if self._peek() == "^" else 0
        first = self.at
        while self._peek() and (self._peek() != "]" or self.at == first):
            self.at += 2 if self._peek() == "\\" else 1
        self.at += 1

    def _repeat(self, node: Node) -> Node:
        counted = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}").match(self.text, self.at)
        if self._peek() in ("*", "+", "?"):
            sign = self._peek()
            self.at += 1
            least, most = (1 if sign == "+" else 0), (1 if sign == "?" else None)
        elif counted and counted[0] != "{}":
            self.at = counted.end()
            least = int(counted[1] or 0)
            most = int(counted[3]) if counted[3] else (None if counted[2] else least)
        else:
            return node
        if self._peek() == "+":
            raise ValueError("possessive repetitions are not handled")
        self.at += 1 if self._peek() == "?" else 0  # lazy or not decides how, not whether it matches
        if max(least, most or 0) > _MAX_COPIES:
            raise ValueError(f"repetitions are limited to {_MAX_COPIES}")
        return Node("repeat", parts=(node,), least=least, most=most)


class _Walk:
    """Positions of one text that can be reached, as the bits of a whole number."""

    def __init__(self, text: str) -> None:
        self.text, self.end, self.masks = text, 1 << len(text), dict[str, int]()
        self._seen: dict[Node, int] = {}

    def _mask(self, atom: str) -> int:
        """Positions whose character the atom matches; Python's own engine decides."""
        if atom not in self.masks:
            one = re.compile(atom)
            self.masks[atom] = sum(1 << at for at, sign in enumerate(self.text) if one.fullmatch(sign))
        return self.masks[atom]

    def _allowed(self, node: Node) -> int:
        """Return the positions at which a piece that matches no characters holds."""
        if node not in self._seen:
            positions = range(len(self.text) + 1)
            if node.kind in ("ahead", "not ahead"):
                matches = [bool(self.go(node.parts[0], 1 << at)) for at in positions]
            else:
                word = [False, *(bool(re.match(r"\w", sign)) for sign in self.text), False]
                matches = [word[at] != word[at + 1] for at in positions]
            positive = node.kind in ("ahead", "edge")
            self._seen[node] = sum(1 << at for at in positions if matches[at] == positive)
        return self._seen[node]

    def go(self, node: Node, at: int) -> int:
        """Return the positions behind a piece that starts at any of some positions."""
        if node.kind == "one":
            return (at & self._mask(node.text)) << 1
        if node.kind in ("start", "end"):
            return at & (1 if node.kind == "start" else self.end)
        if node.kind in ("edge", "inside", "ahead", "not ahead"):
            return at & self._allowed(node)
        if node.kind == "repeat":
            return self._repeat(node, at)
        if node.kind == "any of":
            reached = 0
            for part in node.parts:
                reached |= self.go(part, at)
            return reached
        for part in node.parts:
            at = at and self.go(part, at)
        return at

    def _repeat(self, node: Node, at: int) -> int:
        for _ in range(node.least):
            at = at and self.go(node.parts[0], at)
        reached, new, rounds = at, at, node.least
        while new and (node.most is None or rounds < node.most):
            new = self.go(node.parts[0], new) & ~reached
            reached |= new
            rounds += 1
        return reached


def _plain(key: str) -> tuple[str, tuple[int, ...], bool] | None:
    """Read a key that is a path: its characters, where it has a dot that matches anything, whether it is anchored."""
    anchored = key.startswith("^")
    text, dots = "", []
    pieces = re.findall(r"\\[^A-Za-z0-9]|[^\\]", key.removeprefix("^"))
    if "".join(pieces) != key.removeprefix("^"):
        return None
    for piece in pieces:
        if piece == ".":
            dots.append(len(text))
        elif len(piece) == 1 and re.match(r"[\\^$*+?{}\[\]|()]", piece):
            return None
        text += piece[-1]
    return text, tuple(dots), anchored


@dataclass(frozen=True, slots=True)
class Patterns:
    """The keys of a pattern mapping, in their order, prepared for many modules."""

    plain: dict[tuple[int, tuple[int, ...], bool], dict[str, int]] = field(default_factory=dict)
    general: list[tuple[int, Node]] = field(default_factory=list)

    @classmethod
    def of(cls, keys: Mapping[str, object]) -> Patterns:
        """Prepare keys.

        Raises:
            ValueError: a key is not a regular expression, is too long, or uses syntax that is not supported.
        """
        made = cls()
        for index, key in enumerate(keys):
            if len(key) > MAX_LENGTH:
                raise ValueError(f"{key[:80]!r} is longer than {MAX_LENGTH} characters")
            plain = _plain(key)
            if plain is not None:
                text, dots, anchored = plain
                made.plain.setdefault((len(text), dots, anchored), {}).setdefault(_blank(text, dots), index)
                continue
            made.general.append((index, _general(key)))
            if len(made.general) > MAX_GENERAL:
                raise ValueError(f"at most {MAX_GENERAL} of the keys may be more than plain paths")
        return made

    def first(self, module: str) -> int | None:
        """Return the index of the first key that matches a module path, or None."""
        matches = list(self._plain(module))
        walk = _Walk(module)
        # After the start or after any dot, as PEFT's own `(.*\\.)?` allows.
        starts = 1 | sum(1 << at + 1 for at, sign in enumerate(module) if sign == ".")
        for index, node in self.general:
            if matches and index > min(matches):
                break
            if walk.go(node, starts) & walk.end:
                matches.append(index)
                break
        return min(matches, default=None)

    def _plain(self, module: str) -> Iterator[int]:
        for (length, dots, anchored), texts in self.plain.items():
            start = len(module) - length
            if start < 0 or (start and (anchored or module[start - 1] != ".")):
                continue
            index = texts.get(_blank(module[start:], dots))
            if index is not None:
                yield index


def _blank(text: str, dots: tuple[int, ...]) -> str:
    """Put a sign that no path has where any character will do."""
    signs = list(text)
    for dot in dots:
        signs[dot] = "\0"
    return "".join(signs)


def _general(key: str) -> Node:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # syntax whose meaning may change
            re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"{key[:80]!r} is not a regular expression") from error
    try:
        node = _Parser(key).parse()
        if node.size > _MAX_NODES:
            raise ValueError("it is too large")
    except (ValueError, re.error, RecursionError) as error:
        raise ValueError(f"{key[:80]!r} is a regular expression that is not handled: {error}") from error
    return node


def whole_match(pattern: str) -> Callable[[str], bool] | None:
    """Return a function that decides whether a regular expression matches a whole module path, in bounded time.

    Returns:
        None where the expression cannot be decided here: too long, or with references, lookbehinds or flags.
    """
    try:
        if len(pattern) > _MAX_PATTERN:
            return None
        node = _general(pattern)
    except ValueError:
        return None

    def matches(module: str) -> bool:
        walk = _Walk(module)
        return bool(walk.go(node, 1) & walk.end)

    return matches


@dataclass(frozen=True, slots=True)
class PatternMap:
    """Numbers by pattern of a module path.

    Args:
        values: The setting in the file, checked.
        patterns: Its keys.
    """

    values: tuple[float, ...]
    patterns: Patterns

    def of(self, module: str, default: float) -> float:
        """Return the number of the first key that matches a module path."""
        index = self.patterns.first(module)
        return default if index is None else self.values[index]


def read_patterns(values: Mapping[str, float], what: str) -> PatternMap:
    """Prepare a setting.

    Args:
        values: The numbers by their keys.
        what: File and setting, for messages.

    Raises:
        AdapterFormatError: a key cannot be used.
    """
    try:
        return PatternMap(tuple(values.values()), Patterns.of(values))
    except ValueError as error:
        raise AdapterFormatError(
            f"{what}: {error}. Name the modules by their paths.", code="config.regular-expression"
        ) from error
