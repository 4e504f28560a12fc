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

    An implementation of another package is imported when it is looked up by its name, so that a faulty package does
    not affect other users. A key that is set here takes precedence over an entry point of the same name.

    Args:
        what: Name of one entry, for messages.
        group: Group of the entry points.
        built_in: Names of this package's entries. Options are checked against them, before the entries
            (which may need torch) are imported.
        instances: Whether entries are objects: a registered class is called without arguments to create its object.
    """

    def __init__(self, what: str, group: str, *, built_in: Iterable[str] = (), instances: bool = False) -> None:
        super().__init__()
        self.what, self.group, self.built_in, self._instances = what, group, tuple(built_in), instances

    def __missing__(self, name: str) -> T:
        for point in self._points():
            if point.name == name:
                self._load(point)
                return self[name]
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry, or a default if the name is unknown; `dict.get` would not look at entry points."""
        try:
            return self[name]
        except KeyError:
            return default

    def __contains__(self, name: object) -> bool:
        return (
            super().__contains__(name) or name in self.built_in or any(point.name == name for point in self._points())
        )

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
        others = {*self, *(point.name for point in self._points())} - set(self.built_in)
        return [*self.built_in, *sorted(others)]

    def load_all(self) -> None:
        """Import the implementations of all other packages."""
        for point in self._points():
            if not super().__contains__(point.name):
                self._load(point)

    def _points(self) -> Iterable[EntryPoint]:
        # every start of the command line imports this module, and importlib.metadata is slow to import
        from importlib.metadata import entry_points

        return entry_points(group=self.group)

    def _load(self, point: EntryPoint) -> None:
        try:
            loaded = point.load()
            made = loaded() if self._instances and isinstance(loaded, type) else loaded
        except Exception as error:  # importing another package may raise anything
            raise UsageError(
                f"{self.what} {point.name!r} of {point.value!r} cannot be loaded: {error}.",
                code="registry.not-loadable",
            ) from error
        if not super().__contains__(point.name):  # importing it may have registered it already
            self[point.name] = made
