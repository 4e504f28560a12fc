"""The type of a command as a Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from ..progress import Watcher

P = ParamSpec("P")
S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Function(Protocol[S_contra, P, R_co]):
    """A command as a function of its settings, or of their fields as keyword arguments.

    A type checker reads the fields from the class of the settings. In calls with `watch`, or with positional arguments
    in the order of the command line, it does not check the fields; the function checks them when it is called.
    """

    @overload
    def __call__(self, settings: S_contra, /, *, watch: Watcher = ..., **more: Any) -> R_co: ...
    @overload
    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, *, watch: Watcher, **options: Any) -> R_co: ...
    @overload
    def __call__(self, first: Sequence[str | Path] | str | Path, /, *more: str | Path, **options: Any) -> R_co: ...


def typed(_schema: Callable[P, S], _report: type[R]) -> Function[S, P, R]:
    """Return the type of a command's function; for type checkers only, see `adaptermix.commands.table`."""
    raise NotImplementedError
