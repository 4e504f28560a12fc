"""The commands as Python functions: `train_task(TaskSettings(...))`, or `train_task(base=..., task=..., ...)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from ..errors import PlanError, UsageError, code_of, codes_of
from ..io.files import check_not_input
from ..progress import SILENT, Watcher
from .table import Command, load

if TYPE_CHECKING:
    from ..merging import MergeReport
    from ..options import MergeSettings, Settings

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T", bound="Settings")
S_contra = TypeVar("S_contra", contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Function(Protocol[S_contra, P, R_co]):
    """A command as a function of its settings, or of their fields as keyword arguments.

    A type checker knows the fields from the class of the settings. With `watch`, or with positional arguments in the
    order of the command line, it leaves the fields to the check at run time.
    """

    @overload
    def __call__(self, settings: S_contra, /, *, watch: Watcher = ..., **more: Any) -> R_co: ...
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
    from ..options import Settings
    from ..options.roles import Argument, marks_of

    schema = record.schema()
    run = load(record.run or "")
    positional = list(marks_of(schema, Argument))
    # Arguments of the function that are not options of the command, such as `callbacks`.
    others = set(signature(run).parameters) - {*schema.model_fields, "settings", "watch"}

    @wraps(run)
    def function(*arguments: Any, watch: Watcher = SILENT, **options: Any) -> Any:
        more = {name: options.pop(name) for name in others & options.keys()}
        if arguments and isinstance(arguments[0], Settings):
            if not isinstance(arguments[0], schema):
                raise UsageError(
                    f"{record.function} needs {record.options}, got {type(arguments[0]).__name__}.",
                    code="call.other-options",
                )
            if len(arguments) > 1 or options:
                raise UsageError(
                    f"give either {record.options} or its fields, and not both.", code="call.options-and-fields"
                )
            return record.report(arguments[0], watch=watch, **more)
        if record.takes_fields:
            return run(*arguments, watch=watch, **options)
        if len(arguments) > len(positional):
            raise UsageError(
                f"at most {len(positional)} positional arguments can be given ({', '.join(positional) or 'none'}), "
                f"got {len(arguments)}.",
                code="call.too-many-arguments",
            )
        fields = dict(zip(positional, arguments, strict=False)) | options
        return record.report(_settings(schema, fields), watch=watch, **more)

    # the function is pickled by the name that it has in `adaptermix`
    function.__module__, function.__qualname__ = "adaptermix", record.function or ""
    return function


def _settings(schema: type[T], fields: Mapping[str, Any]) -> T:
    """Return settings made of fields; their faults are an error of this package, as those of recipes are."""
    from pydantic import ValidationError

    from ..options.base import described

    try:
        return schema(**{name: _plain(value) for name, value in fields.items()})
    except ValidationError as error:
        text = " ".join(described(error, schema))
        raise UsageError(text, code=code_of(error, "option.invalid"), codes=codes_of(error)) from error


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
    *,
    weights: Sequence[float] | float,
    out: str | Path | None = None,
    watch: Watcher = SILENT,
    **options: Any,
) -> MergeReport: ...
def merge(adapters: Any, *, watch: Watcher = SILENT, **options: Any) -> Any:
    """Merge adapters, or full checkpoints; a method that learns its weights learns them first.

    Args:
        adapters: `MergeSettings`; or adapter folders, or checkpoint folders with `base`, and the fields of
            `MergeSettings` as keyword arguments. Without `out` they are merged for the report only.
        watch: Receives progress.
        options: Fields of `MergeSettings`; for checkpoints also `shard_size`.

    Raises:
        AdapterMixError: the inputs do not go together, or data and model are not valid.
    """
    from ..merging import merge as merge_adapters
    from ..merging.request import is_checkpoint, merge_with_settings
    from ..options import MergeSettings
    from ..options.roles import Role, marked

    if isinstance(adapters, MergeSettings):
        return merge_with_settings(adapters, watch=watch)
    if marked(MergeSettings, Role.LEARNING) & set(options) or _learns(options):
        if options.get("out") is None:
            raise PlanError("a merge that learns its weights needs a folder to write: give out.", code="merge.no-out")
    elif not any(map(is_checkpoint, adapters)):
        return merge_adapters(adapters, watch=watch, **options)
    elif all(map(is_checkpoint, adapters)) and options.get("base") is not None:
        return _merge_checkpoints(adapters, options, watch)
    return merge_with_settings(_settings(MergeSettings, {"adapters": list(adapters), **options}), watch=watch)


def _merge_checkpoints(models: Sequence[str | Path], options: dict[str, Any], watch: Watcher) -> MergeReport:
    from ..merging.checkpoints import merge_checkpoints
    from ..merging.request import merge_with_settings
    from ..options import MergeSettings

    out, weights = options.get("out"), options.get("weights")
    known = {*signature(merge_checkpoints).parameters, "dry_run"}
    if not options.keys() <= known or weights is None:  # the settings say what checkpoints do not take
        settings = _settings(MergeSettings, {"adapters": list(models), **options})
        report: MergeReport = merge_with_settings(settings, watch=watch)
        return report
    if options.pop("dry_run", False):
        options["out"] = out = None
    base = options.pop("base")
    if out is not None:
        check_not_input(Path(out), [base, *models])
    options["weights"] = [weights] if isinstance(weights, int | float) else weights
    return merge_checkpoints(base, models, watch=watch, **options)


def _learns(options: Mapping[str, Any]) -> bool:
    from ..methods import METHODS

    method = METHODS.get(str(options.get("method", "exact")))
    return method is not None and bool(method.learner)
