"""Options of mergekit's methods: their types, their ranges, and values that differ by adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..algebra import Stack
from ..errors import InvalidValueError, UsageError, did_you_mean

if TYPE_CHECKING:
    from mergekit.merge_methods.base import ParameterSpec

Parameters = dict[str, Any]
"""Values of mergekit's parameters by name: numbers, truth values, and lists of them."""
PARTS = ("input", "non_base")
"""mergekit's scopes of the parameters that have a separate value for each model."""
_Range = tuple[Callable[[float], bool], str]
_RANGES: dict[str, _Range] = {
    "density": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "select_topk": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "gamma": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "epsilon": (lambda value: value >= 0, "at least 0"),
    "eps": (lambda value: value > 0, "above 0"),
    "tol": (lambda value: value > 0, "above 0"),
    "max_iter": (lambda value: value >= 1, "at least 1"),
}
_OF_MEMBER: dict[tuple[str, str], _Range] = {
    ("slerp", "t"): (lambda value: 0 <= value <= 1, "in [0, 1]"),
    ("nearswap", "t"): (lambda value: value >= 0, "at least 0"),
}


def check_option(member: str, parameter: ParameterSpec, value: object) -> None:
    """Refuse a value of the wrong type, or one outside the range for which the method is defined.

    Args:
        member: mergekit's name of the method.
        parameter: mergekit's specification of the parameter.
        value: One value; for a parameter with a value per model, also a list, or a mapping from adapter names.

    Raises:
        UsageError: the value is refused.
    """
    name, title = parameter.name, f"option '{parameter.name}' of method 'mergekit:{member}'"
    values = [value]
    if parameter.scope.value in PARTS and isinstance(value, list | tuple | Mapping):
        values = list(value.values()) if isinstance(value, Mapping) else list(value)
    holds, words = _OF_MEMBER.get((member, name)) or _RANGES.get(name) or (math.isfinite, "finite")
    for one in values:
        expected = getattr(parameter.value_type, "__name__", "a number")
        try:
            result = parameter.validate(one)
        except ValueError as error:
            raise UsageError(f"{title} must be {expected}, got {one!r}.", code="mergekit.option-value") from error
        if isinstance(one, bool) and parameter.value_type is not bool:
            raise UsageError(f"{title} must be {expected}, got {one!r}.", code="mergekit.option-value")
        is_number = isinstance(result, int | float) and not isinstance(result, bool)
        if is_number and not (math.isfinite(result) and holds(result)):
            raise UsageError(f"{title} must be {words}, got {one!r}.", code="mergekit.option-value")


def per_adapter(name: str, value: object, stack: Stack) -> list[object]:
    """Return a parameter's value for each update of a stack.

    Args:
        name: Name of the parameter.
        value: One value for all, a list in the order of the adapters, or a mapping from adapter names.
        stack: The updates, with the names of all adapters of the merge.

    Raises:
        ValueError: the list or the names do not fit the adapters.
    """
    adapters = stack.adapters or stack.names
    indices = stack.indices or range(len(stack.updates))
    if isinstance(value, Mapping):
        for key in value:
            if adapters.count(key) != 1:
                raise InvalidValueError(
                    f"{name} must name each adapter once, got {key!r}.{did_you_mean(str(key), adapters)} "
                    f"The adapters are {', '.join(adapters)}",
                    code="mergekit.per-adapter-names",
                )
        if missing := [adapter for adapter in adapters if adapter not in value]:
            raise InvalidValueError(
                f"{name} must have a value for every adapter, and lacks one for {', '.join(missing)}",
                code="mergekit.per-adapter-missing",
            )
        return [value[adapters[index]] for index in indices]
    if isinstance(value, list | tuple):
        if len(value) != len(adapters):
            raise InvalidValueError(
                f"{name} must have one value per adapter, got {len(value)} for {len(adapters)}",
                code="mergekit.per-adapter-count",
            )
        return [value[index] for index in indices]
    return [value] * len(stack.updates)
