"""Parameters of a search, and how `--vary KEY=...` writes them: options of a merge method, settings of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import isfinite, sqrt
from typing import Any

from ..errors import UsageError
from ..io.json_types import JsonValue
from ..io.limited_yaml import parse_yaml

Plain = Any
"""A value from YAML: a number, a text, a list, ...; the option or setting that it is for checks it."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers from `low` to `high`, both included; `whole` numbers, or on a `log` scale."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.low}:{self.high}" + ":log" * self.log

    @property
    def middle(self) -> float:
        """The number halfway between the ends.

        Example:
            >>> Interval(1, 100, log=True, whole=True).middle, Interval(0.0, 1.0).middle
            (10, 0.5)
        """
        value = sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(value) if self.whole else value


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several values."""

    values: tuple[Plain, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Parameter = Interval | Choice
Point = Mapping[str, Plain]
"""One value per parameter."""


def read_parameter(key: str, text: str) -> Parameter:
    """Read `LOW:HIGH`, `LOW:HIGH:log`, `V,V` or a YAML list.

    A range holds whole numbers if both ends are written as such, so 0:1 is 0 or 1, and 0.0:1 is any number between. A
    single text with a colon in it is written as a list: `[0:100]`.

    Raises:
        UsageError: the text has another form.

    Example:
        >>> read_parameter("layer", "6:12")
        Interval(low=6, high=12, log=False, whole=True)
        >>> read_parameter("temperature", "0.05:2:log")
        Interval(low=0.05, high=2.0, log=True, whole=False)
        >>> read_parameter("targets", "[[q_proj, v_proj], all-linear]").values
        (['q_proj', 'v_proj'], 'all-linear')
        >>> read_parameter("rate", "1e-4,3e-4,true").values
        (0.0001, 0.0003, True)
    """
    text = text.strip()
    is_range = ":" in text and "," not in text and not text.startswith(("[", "'", '"'))
    parameter = _interval(text) if is_range else _choice(text)
    if parameter is None:
        raise UsageError(
            f"--vary {key} must be LOW:HIGH with LOW < HIGH, LOW:HIGH:log with LOW above 0, or values separated "
            f"by commas or a YAML list, with one value or more, each once; got {text!r}.",
            code="vary.value",
        )
    return parameter


def _interval(text: str) -> Interval | None:
    first, second, *scale = (part.strip() for part in text.split(":"))
    low, high = _number(first), _number(second)
    if low is None or high is None or low >= high or scale not in ([], ["log"]) or (scale and low <= 0):
        return None
    if isinstance(low, int) and isinstance(high, int):
        return Interval(low, high, log=bool(scale), whole=True)
    return Interval(float(low), float(high), log=bool(scale))


def _number(text: str) -> int | float | None:
    for read in (int, float):
        try:
            number = read(text)
        except ValueError:
            continue
        return number if isfinite(number) else None
    return None


def _choice(text: str) -> Choice | None:
    try:
        values = parse_yaml(text if text.startswith("[") else f"[{text}]")
    except ValueError:
        return None
    if not isinstance(values, list) or not values or None in values or "" in values:
        return None
    values = [_exponent(value) for value in values]
    return Choice(tuple(values)) if len(set(map(label, values))) == len(values) else None


def _exponent(value: Plain) -> Plain:
    """Return 1e-4 as a number; YAML reads it as text."""
    if not isinstance(value, str) or "e" not in value.lower():
        return value
    number = _number(value)
    return value if number is None else number


def label(value: Plain) -> Plain:
    """Return a value in the form that optuna can store: lists and mappings as JSON text.

    Example:
        >>> label(["q_proj", "v_proj"]), label(0.1)
        ('["q_proj", "v_proj"]', 0.1)
    """
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value, sort_keys=True)


def described(parameter: Parameter) -> JsonValue:
    """Return a parameter as plain data.

    Example:
        >>> described(Interval(0.05, 2.0, log=True)), described(Choice((1, 2)))
        ([0.05, 2.0, 'log'], {'values': [1, 2]})
    """
    if isinstance(parameter, Choice):
        return {"values": list(parameter.values)}
    return [parameter.low, parameter.high, *(["log"] * parameter.log)]


def ends(parameters: Mapping[str, Parameter]) -> dict[str, Choice]:
    """Return the values that a check must try: the ends of ranges, and all values of choices.

    Example:
        >>> ends({"density": Interval(0.1, 0.9), "order": Choice(("a", "b"))})
        {'density': Choice(values=(0.1, 0.9)), 'order': Choice(values=('a', 'b'))}
    """
    return {key: Choice((p.low, p.high)) if isinstance(p, Interval) else p for key, p in parameters.items()}


def combinations(parameters: Mapping[str, Parameter]) -> list[dict[str, Plain]]:
    """Return all combinations of values; the last parameter changes fastest.

    Raises:
        UsageError: a parameter is a range, which has no end of values.

    Example:
        >>> combinations({"a": Choice((1, 2)), "b": Choice((3,))})
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    values = []
    for key, parameter in parameters.items():
        if isinstance(parameter, Interval):
            raise UsageError(
                f"a grid needs values, and --vary {key} is a range: give V,V, or --trials N.", code="vary.range-in-grid"
            )
        values.append(parameter.values)
    return [dict(zip(parameters, combination, strict=True)) for combination in product(*values)]
