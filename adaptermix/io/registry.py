"""Named implementations that other packages can add to, by entry points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InvalidValueError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class Registry(dict[str, T]):
    """Implementations by name: those of this package, those that a program adds, and those of other packages.

    An implementation of another package is imported when it is looked up by its name, so that a faulty package harms
    nobody who does not use it. A key that is set here takes precedence over an entry point of the same name.

    Args:
        what: Name of one entry, for messages.
        group: Group of the entry points.
        own: Names of this package's entries. Options are checked against them before the entries themselves, which may
            need torch, are imported.
        instances: Whether an entry is an object without arguments, so that a class that is registered is called.
    """

    def __init__(self, what: str, group: str, *, own: Iterable[str] = (), instances: bool = False) -> None:
        super().__init__()
        self.what, self.group, self.own, self._instances = what, group, tuple(own), instances

    def __missing__(self, name: str) -> T:
        for point in self._points():
            if point.name == name:
                self._load(point)
                return self[name]
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry, or a default if the name is unknown; `dict.get` would not ask other packages."""
        return self[name] if name in self else default

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.own or any(point.name == name for point in self._points())

    def add(self, name: str, entry: T) -> None:
        """Register an entry under a name that is free.

        Raises:
            ValueError: the name is taken.
        """
        if super().__contains__(name):
            there = self[name]
            raise InvalidValueError(
                f"a {self.what} named {name!r} exists: {getattr(there, '__qualname__', repr(there))}",
                code="registry.name-taken",
            )
        self[name] = entry

    def names(self) -> list[str]:
        """Return all names, those of this package first, without importing other packages."""
        others = {*self, *(point.name for point in self._points())} - set(self.own)
        return [*self.own, *sorted(others)]

    def load_all(self) -> None:
        """Import the implementations of all other packages."""
        for point in self._points():
            if not super().__contains__(point.name):
                self._load(point)

    def _points(self) -> Iterable[EntryPoint]:
        # importing this module takes part in every start of the command line, and importlib.metadata is slow to import
        from importlib.metadata import entry_points

        return entry_points(group=self.group)

    def _load(self, point: EntryPoint) -> None:
        try:
            loaded: Any = point.load()
            made = loaded() if self._instances and isinstance(loaded, type) else loaded
        except Exception as error:  # whatever the other package does when it is imported
            raise UsageError(
                f"{self.what} {point.name!r} of {point.value!r} cannot be loaded: {error}.",
                code="registry.not-loadable",
            ) from error
        if not super().__contains__(point.name):  # importing it may have registered it already
            self[point.name] = made
