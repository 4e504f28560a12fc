"""Reading untrusted YAML: limits on size, depth, and the expansion of aliases and variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import ConfigError, did_you_mean
from .yaml_lines import Faults

MOST_BYTES, MOST_DEPTH, MOST_ENTRIES, MOST_CHARACTERS = 2**20, 40, 100_000, 2**22
_LONGEST_NUMBER = 400
"""Longest number, in characters. Base-60 numbers (`1:1:1`) take quadratic time, and longer ones cannot be printed."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def read_yaml(path: Path) -> object:
    """Return the content of a YAML file.

    Raises:
        ConfigError: there is no such file, it is not YAML, or it is larger than any recipe.
    """
    try:
        if not path.is_file() and path.exists():
            raise ConfigError(f"a recipe must be a file, and {path} is a folder or a device.", code="recipe.not-file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(
                f"a recipe must have at most {MOST_BYTES >> 20} MiB, and {path} has more.", code="recipe.too-large"
            )
        return parse_yaml(content.decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"a recipe file must exist, and {path} does not.", code="recipe.not-found") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} must be YAML: {' '.join(str(error).split())[:300]}", code="recipe.not-yaml"
        ) from error


def parse_yaml(text: str) -> object:
    """Return the value of YAML text.

    Raises:
        ValueError: it is not YAML, nests too deeply, or an alias expands to too much or to itself.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError(f"lists and mappings must nest at most {MOST_DEPTH} deep") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:  # Raised for values such as `!!bool x`.
        raise ValueError(f"a value cannot be read ({error})") from error
    finally:
        if loader:
            loader.dispose()


def _size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return the number of entries that a node expands to, counting those that aliases repeat.

    Raises:
        ValueError: the node has too many entries, is too deep or endless, or contains a number that is too long.
    """
    if not isinstance(node, yaml.CollectionNode):
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise ValueError(f"a number must have at most {_LONGEST_NUMBER} characters, found {len(node.value):,}")
        return 1
    size = known.get(id(node))
    if size == 0:
        raise ValueError("an alias must not stand for a value that contains it")
    if size is not None:
        return size
    if depth >= MOST_DEPTH:
        raise ValueError(f"lists and mappings must nest at most {MOST_DEPTH} deep")
    known[id(node)] = 0
    children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
    total = 1 + sum(_size(child, known, depth + 1) for child in children)
    if total > MOST_ENTRIES:
        raise ValueError(f"aliases may expand to at most {MOST_ENTRIES:,} entries together")
    known[id(node)] = total
    return total


@dataclass(slots=True)
class _Budget:
    """How much variables may still expand to."""

    characters: int = MOST_CHARACTERS
    entries: int = MOST_ENTRIES


class Filling:
    """Replaces `${name}` in strings at any depth; a string that consists of one variable gets its value and type.

    Args:
        variables: Values by name.
        faults: Errors are added here, so that all of them can be reported at once.
    """

    def __init__(self, variables: Mapping[str, object], faults: Faults) -> None:
        self._variables, self._faults = variables, faults
        self._budget = _Budget()

    def of(self, variables: Mapping[str, object]) -> Filling:
        """Return a filling with other variables; both together may expand to as much as one."""
        other = Filling(variables, self._faults)
        other._budget = self._budget
        return other

    def __call__(self, value: object) -> object:
        """Return a value with its variables replaced."""
        self._budget.entries -= 1
        if not self._fits():
            return None
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self(item) for item in value]
        return self._text(value) if isinstance(value, str) else value

    def _fits(self) -> bool:
        if self._budget.characters >= 0 and self._budget.entries >= 0:
            return True
        most = f"{MOST_ENTRIES:,} entries and {MOST_CHARACTERS >> 20} MiB of text"
        self._faults.at((), f"variables may expand to at most {most}")
        return False

    def _text(self, value: str) -> object:
        for name in _VARIABLE.findall(value):
            if name not in self._variables:
                near = did_you_mean(name, list(self._variables))
                known = f" Known: {', '.join(self._variables) or 'none'}."
                self._faults.at(f"${{{name}}}", f"unknown variable ${{{name}}}.{near or known}")
                return value
        whole = _VARIABLE.fullmatch(value)
        if whole:
            match = self._variables[whole[1]]
            self._budget.entries -= _count(match)
            return match
        texts = {name: str(self._variables[name]) for name in set(_VARIABLE.findall(value))}
        self._budget.characters -= len(value) + sum(len(texts[name]) for name in _VARIABLE.findall(value))
        return _VARIABLE.sub(lambda match: texts[match[1]], value) if self._fits() else None


def _count(value: object) -> int:
    """Return the number of entries of a value. Values read here are neither deep nor endless, so recursion is safe."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_count, items))


def names_in(value: object) -> set[str]:
    """Return the names of the variables that a value contains as `${name}`, at any depth.

    Example:
        >>> sorted(names_in({"out": "${out}/${layer}", "data": ["x"]}))
        ['layer', 'out']
    """
    if isinstance(value, str):
        return set(_VARIABLE.findall(value))
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {name for item in items for name in names_in(item)}


def shortened(value: object) -> str:
    """Return a value for a message, at most a line or two long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
