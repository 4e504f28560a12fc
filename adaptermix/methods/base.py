"""What a merge method is, and the table of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from ..algebra import LowRank
from ..errors import PlanError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMethod(ABC):
    """A pure function from the updates of one module to their merge; its fields are its hyper-parameters."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """Merge the updates of one module.

        Args:
            updates: One per adapter that has this module, all [out in].
            weights: One per update.
        """


METHODS: dict[str, type[MergeMethod]] = {}

_M = TypeVar("_M", bound=type[MergeMethod])


def method(name: str) -> Callable[[_M], _M]:
    """Enter a method in the table under a name that is not taken."""

    def enter(cls: _M) -> _M:
        if name in METHODS:
            raise ValueError(f"a merge method named {name!r} exists: {METHODS[name].__qualname__}")
        cls.name = name
        METHODS[name] = cls
        return cls

    return enter


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    return f"unknown {what} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}."


def build(name: str, options: Mapping[str, Any]) -> MergeMethod:
    """Return the method of this name with these hyper-parameters.

    Raises:
        PlanError: no such method, no such option, or a value that the method refuses.
    """
    if name not in METHODS:
        raise PlanError(_unknown("merge method", name, sorted(METHODS)))
    cls = METHODS[name]
    known = [field.name for field in fields(cls)]
    for key in options:
        if key not in known:
            raise PlanError(_unknown(f"option of method '{name}'", key, known))
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise PlanError(f"method '{name}': {error}") from error
