"""The commands as Python functions: `evaluate(EvaluateSettings(...))`, or `evaluate(base=..., task=..., ...)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..errors import PlanError, UsageError, code_of, codes_of, near_or_known
from ..progress import SILENT, Watcher
from .in_memory import stored
from .record import Command, load
from .table import COMMANDS

if TYPE_CHECKING:
    from ..merging import MergeReport
    from ..merging.in_memory import AdapterInput
    from ..options import MergeSettings, Settings

T = TypeVar("T", bound="Settings")


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
            _check_call(run, schema, arguments, options)
            fields = dict(zip(signature(run).parameters, arguments, strict=False)) | options
            with record.recorded(lambda: _settings(schema, fields)):
                return run(*arguments, watch=watch, **options)
        if len(arguments) > len(positional):
            raise UsageError(
                f"at most {len(positional)} positional arguments can be given ({', '.join(positional) or 'none'}), "
                f"got {len(arguments)}.",
                code="call.too-many-arguments",
            )
        with stored(schema, dict(zip(positional, arguments, strict=False)) | options) as fields:
            return record.report(_settings(schema, fields), watch=watch, **more)

    # the function is pickled by the name that it has in `adaptermix`
    function.__module__, function.__qualname__ = "adaptermix", record.function or ""
    return function


def _check_call(
    run: Callable[..., Any], schema: type[Settings], arguments: Sequence[object], options: Mapping[str, object]
) -> None:
    """Refuse arguments that a function does not have, and a call without a necessary one.

    Raises:
        UsageError: an argument is unknown, missing, or given twice.
    """
    named = (each for each in signature(run).parameters.values() if each.kind is not each.VAR_KEYWORD)
    known = [*schema.model_fields, *(each.name for each in named if each.name not in schema.model_fields)]
    _check_names(options, known)
    try:
        signature(run).bind(*arguments, **options)
    except TypeError as error:
        raise UsageError(f"{run.__name__}: {error}.", code="call.arguments") from error


def _check_names(options: Mapping[str, object], known: Collection[str]) -> None:
    for name in options:
        if name not in known:
            raise UsageError(f"unknown argument {name!r}.{near_or_known(name, known)}", code="call.unknown-argument")


def _settings(schema: type[T], fields: Mapping[str, object]) -> T:
    """Return settings made of fields; invalid fields raise an error of this package, as in recipes."""
    from pydantic import ValidationError

    from ..options.base import described

    try:
        return schema(**{name: _plain(value) for name, value in fields.items()})
    except ValidationError as error:
        text = " ".join(sentence for _, sentence in described(error, schema))
        raise UsageError(text, code=code_of(error, "option.invalid"), codes=codes_of(error)) from error


def _plain(value: object) -> object:
    """Return a value with its paths as texts."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@overload
def merge(settings: MergeSettings, /, *, watch: Watcher = SILENT) -> MergeReport: ...
@overload
def merge(
    adapters: Sequence[AdapterInput],
    *,
    weights: Sequence[float] | float,
    out: str | Path | None = None,
    watch: Watcher = SILENT,
    **options: Any,
) -> MergeReport: ...
def merge(adapters: Any, *, watch: Watcher = SILENT, **options: Any) -> Any:
    """Merge adapters, or full checkpoints; a method that learns its weights learns them first.

    Args:
        adapters: `MergeSettings`; or adapter folders, adapters in memory (see `merging.in_memory.folders_of`), or
            checkpoint folders with `base`, and the fields of `MergeSettings` as keyword arguments. Without `out` the
            function writes no file, and the result is the `adapter` of the report.
        watch: Receives progress.
        options: Fields of `MergeSettings`; for checkpoints also `shard_size`.

    Raises:
        AdapterMixError: the inputs cannot be merged with each other, or the data or the model are invalid.
    """
    from ..merging import merge as merge_adapters
    from ..merging.in_memory import folders_of, is_in_memory
    from ..merging.merge_options import MergeKeywords
    from ..merging.request import is_checkpoint, merge_with_settings
    from ..models.stack import stack_folder
    from ..options import MergeSettings
    from ..options.roles import Role, marked

    if isinstance(adapters, MergeSettings):
        with COMMANDS["merge"].recorded(lambda: adapters):
            return merge_with_settings(adapters, watch=watch)
    if isinstance(adapters, str | os.PathLike):
        folder = os.fspath(adapters)
        raise UsageError(
            f"adapters must be a list of folders, got the text {folder!r}: write [{folder!r}].",
            code="merge.one-folder",
        )
    adapters = list(adapters)
    if any(map(is_in_memory, adapters)):
        with folders_of(adapters) as folders:
            return merge(folders, watch=watch, **options)
    _check_names(options, [*MergeSettings.model_fields, "shard_size", *MergeKeywords.__annotations__, "learned"])
    if "weights" not in options:
        raise UsageError("weights must be given, one per adapter, such as weights=[0.9, 0.1].", code="merge.no-weights")
    is_learned = bool(marked(MergeSettings, Role.LEARNING) & set(options)) or _learns(options)
    if is_learned and options.get("out") is None:
        raise PlanError("a merge that learns its weights needs a folder to write: give out.", code="merge.no-out")
    fields = {"adapters": list(adapters)} | {name: value for name, value in options.items() if value is not None}
    if isinstance(options["weights"], int | float):
        fields["weights"] = [options["weights"]]
    with COMMANDS["merge"].recorded(lambda: _settings(MergeSettings, fields)):
        if not is_learned and not any(is_checkpoint(path) or stack_folder(str(path)) for path in adapters):
            return merge_adapters(adapters, watch=watch, **options)
        if not is_learned and all(map(is_checkpoint, adapters)) and _of_checkpoints(options):
            return _merge_checkpoints(adapters, watch=watch, **options)
        return merge_with_settings(_settings(MergeSettings, {"adapters": list(adapters), **options}), watch=watch)


def _of_checkpoints(options: Mapping[str, object]) -> bool:
    """Return whether `merge_checkpoints` takes these options; if not, `MergeSettings` names the fault."""
    from ..merging.checkpoints import CheckpointKeywords, merge_checkpoints

    needed = None not in (options.get("base"), options.get("weights"))
    known = {*signature(merge_checkpoints).parameters, *CheckpointKeywords.__annotations__, "dry_run"}
    return needed and options.keys() <= known


def _merge_checkpoints(
    models: Sequence[str | Path],
    *,
    base: str | Path,
    weights: Sequence[float] | float,
    out: str | Path | None = None,
    dry_run: bool = False,
    **options: Any,
) -> MergeReport:
    from ..merging.checkpoints import merge_checkpoints

    listed = [weights] if isinstance(weights, int | float) else weights
    return merge_checkpoints(base, models, listed, out=None if dry_run else out, **options)


def _learns(options: Mapping[str, object]) -> bool:
    from ..methods import METHODS

    method = METHODS.get(str(options.get("method", "exact")))
    return method is not None and bool(method.learner)
