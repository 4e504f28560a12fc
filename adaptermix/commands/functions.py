"""The commands as Python functions: `train_task(TaskSettings(...))`, or `train_task(base=..., task=..., ...)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from ..errors import UsageError
from ..progress import SILENT, Watcher
from .table import Command, load

if TYPE_CHECKING:
    from ..merging import MergeReport
    from ..options import MergeSettings

P = ParamSpec("P")
S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Function(Protocol[S_contra, P, R_co]):
    """A command as a function of its settings, or of their fields as keyword arguments.

    A type checker knows the fields from the class of the settings. With `watch`, or with positional arguments in the
    order of the command line, it leaves the fields to the check at run time.
    """

    @overload
    def __call__(self, settings: S_contra, /, *, watch: Watcher = ...) -> R_co: ...
    @overload
    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, *, watch: Watcher, **options: Any) -> R_co: ...
    @overload
    def __call__(self, first: Sequence[str | Path] | str | Path, /, *more: str | Path, **options: Any) -> R_co: ...


def typed(_schema: Callable[P, S], _run: Callable[..., R]) -> Function[S, P, R]:
    """Give a command's function its type; for type checkers only, see `adaptermix/__init__.py`."""
    raise NotImplementedError


def function_of(record: Command) -> Callable[..., Any]:
    """Return the function of a command, with its settings, or their fields, as arguments."""
    from ..options.roles import Argument, marks_of

    schema = record.schema()
    run = load(record.run or "")
    positional = list(marks_of(schema, Argument))

    @wraps(run)
    def function(*arguments: Any, watch: Watcher = SILENT, **options: Any) -> Any:
        if arguments and isinstance(arguments[0], schema):
            if len(arguments) > 1 or options:
                raise UsageError(
                    f"give either {record.options} or its fields, and not both.", code="call.options-and-fields"
                )
            return record.call(arguments[0], watch=watch)
        if record.takes_fields:
            return run(*arguments, watch=watch, **options)
        if len(arguments) > len(positional):
            raise UsageError(
                f"at most {len(positional)} positional arguments can be given ({', '.join(positional) or 'none'}), "
                f"got {len(arguments)}.",
                code="call.too-many-arguments",
            )
        fields = dict(zip(positional, arguments, strict=False)) | options
        return record.call(schema(**{name: _plain(value) for name, value in fields.items()}), watch=watch)

    # the function is pickled by the name that it has in `adaptermix`
    function.__module__, function.__qualname__ = "adaptermix", record.function or ""
    return function


def _plain(value: Any) -> Any:
    """Return a value with its paths as texts."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@overload
def merge(settings: MergeSettings, /, *, watch: Watcher = SILENT) -> MergeReport: ...
@overload
def merge(
    adapters: Sequence[str | Path],
    /,
    *,
    weights: Sequence[float],
    out: str | Path | None = None,
    watch: Watcher = SILENT,
    **options: Any,
) -> MergeReport: ...
def merge(adapters: Any, /, *, watch: Watcher = SILENT, **options: Any) -> Any:
    """Merge adapters, or full checkpoints; a method that learns its weights learns them first.

    Args:
        adapters: `MergeSettings`; or adapter folders, or checkpoint folders with `base`, and the fields of
            `MergeSettings` as keyword arguments. Adapters without `out` are merged in memory, for the report only.
        watch: Receives progress.
        options: Fields of `MergeSettings`.

    Raises:
        AdapterMixError: the inputs do not go together, or data and model are not valid.
    """
    from ..merging import merge as merge_adapters
    from ..merging.request import is_checkpoint
    from ..options import MergeSettings
    from ..options.roles import Role, marked
    from ..weight_search import merge_learned

    if isinstance(adapters, MergeSettings):
        return merge_learned(adapters, watch=watch)
    is_learned = marked(MergeSettings, Role.LEARNING) & set(options) or _learns(options)
    if not is_learned and not any(map(is_checkpoint, adapters)):
        return merge_adapters(adapters, watch=watch, **options)
    fields = {name: _plain(value) for name, value in options.items()}
    return merge_learned(MergeSettings(adapters=_plain(list(adapters)), **fields), watch=watch)


def _learns(options: Mapping[str, Any]) -> bool:
    from ..methods import METHODS

    method = METHODS.get(str(options.get("method", "exact")))
    return method is not None and bool(method.learner)
