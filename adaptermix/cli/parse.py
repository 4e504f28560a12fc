"""Commands of the command line, made from their records and the classes of their options."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..commands.record import Command, document_of, load
from ..errors import AdapterMixError, as_line
from ..options import Settings
from ..options.existing import require_inputs
from ..options.registries import OneOf
from ..options.roles import ADAPTER, Argument, Flag, Panel, Reads, Role, Writes
from .console import Console
from .help_text import OPTIONS, HelpfulCommand, SettingsOption, help_all_option

_SCALARS: dict[object, object] = {int: click.INT, float: click.FLOAT, str: click.STRING}


T = TypeVar("T")


_ARGUMENTS = "adaptermix.arguments"


class VariadicCommand(HelpfulCommand):
    """Lets `--pairs a.tsv b.tsv` stand for `--pairs a.tsv --pairs b.tsv`; values end at the next option."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete options, and paths for further values of an option such as --pairs."""
        return super().shell_complete(ctx, incomplete) or [CompletionItem(incomplete, type="file")]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before each further value."""
        ctx.meta[_ARGUMENTS] = tuple(args)
        many = {name for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        spread: list[str] = []
        current: str | None = None
        values = 0
        for position, argument in enumerate(args):
            if argument == "--":
                spread += args[position:]
                break
            if argument.startswith("-") and not _is_number(argument):
                if current and not values:
                    raise click.UsageError(f"Option '{current}' needs at least one value.", ctx)
                current, values = (argument if argument in many else None), 0
                spread.append(argument)
                continue
            if current and values:
                spread.append(current)
            values += 1
            spread.append(argument)
        return super().parse_args(ctx, spread)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if TYPE_CHECKING:
    _NumbersType = click.ParamType[list[float]]
else:  # generic since click 8.4 only
    _NumbersType = click.ParamType


class Numbers(_NumbersType):
    """`0.5,0.7,0.9`."""

    name = "W[,W...]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Split at commas."""
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"numbers separated by commas are needed, such as 0.5,0.7,0.9, got {value!r}.", param, ctx)


def _core(annotation: object) -> Any:
    """Strip Annotated and `| None`."""
    if get_origin(annotation) is Annotated:
        return _core(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _core(members[0])
        return str  # such as int | "middle": the settings decide
    return annotation


def _kind(annotation: object) -> dict[str, Any]:
    """Return click's keyword arguments for a field's type."""
    core = _core(annotation)
    if core is bool:
        return {"is_flag": True}
    if get_origin(core) is Literal:
        return {"type": click.Choice([str(choice) for choice in get_args(core)])}
    if get_origin(core) is list:
        inner = _core(get_args(core)[0])
        return {"type": Numbers()} if inner is float else {"multiple": True, "metavar": "FILE..."}
    if get_origin(core) is dict:
        return {"multiple": True, "metavar": "KEY=VALUE"}
    return {"type": _SCALARS.get(core, click.STRING)}


def _text(default: object) -> str:
    """Return a default as it is typed on the command line."""
    if not isinstance(default, list):
        return str(default)
    numbers = all(isinstance(value, float) for value in default)
    return ",".join(f"{value:g}" for value in default) if numbers else " ".join(default)


def _mark(field: FieldInfo, kind: type[T]) -> T | None:
    return next((mark for mark in reversed(field.metadata) if isinstance(mark, kind)), None)


def _flag(name: str, field: FieldInfo) -> str:
    mark = _mark(field, Flag)
    return mark.name if mark and mark.name else "--" + name.replace("_", "-")


def _panel_of(settings: type[Settings], name: str) -> str:
    """Return the title of an option: its `Panel` mark, else the panel of the first class that defines the option."""
    if mark := _mark(settings.model_fields[name], Panel):
        return mark.value
    first = [cls for cls in settings.__mro__ if name in vars(cls).get("__annotations__", ())][-1]
    panel: Panel | None = vars(first).get("panel")
    return panel.value if panel else OPTIONS


def _option(name: str, field: FieldInfo, panel: str, *, is_common: bool) -> click.Option:
    flag = _flag(name, field)
    help_text = field.description or ""
    if not field.is_required() and (field.default not in (None, False, [], {}) or type(field.default) is int):
        default = _text(field.default)
        help_text += f"  [default: {default}]"
    kind = _kind(field.annotation)
    if field.default is True:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
        help_text = help_text.replace("[default: True]", "[default: yes]")
    if choices := _mark(field, OneOf):
        # Other packages may add to these names, so the options check the value.
        kind["metavar"] = f"[{'|'.join(choices.choices)}]"
    mark = _mark(field, Flag) or Flag()
    if mark.also:
        kind["type"] = click.Choice([*kind["type"].choices, *mark.also])
    reads = _mark(field, Reads)
    if reads and reads.use == ADAPTER and kind.get("multiple"):
        kind["metavar"] = "DIR..."
    if mark.metavar and kind.get("multiple"):
        kind["metavar"] = mark.metavar
    flags = [flag, *([mark.alias] if mark.alias else []), name]
    required = field.is_required()
    return SettingsOption(
        flags,
        required=required,
        default=None,
        help=help_text,
        panel=panel,
        is_common=is_common or required,
        shell_complete=_completion(field),
        **kind,
    )


def _completion(field: FieldInfo) -> Callable[..., list[CompletionItem]] | None:
    """Return the completion of an option's values in a shell: paths, or names; None leaves it to the type."""
    if choices := _mark(field, OneOf):
        return lambda _ctx, _option, start: [CompletionItem(name) for name in choices.choices if name.startswith(start)]
    is_path = _mark(field, Reads) or _mark(field, Writes)
    return (lambda _ctx, _option, start: [CompletionItem(start, type="file")]) if is_path else None


def _parameters(settings: type[Settings], hidden: Sequence[str]) -> list[click.Parameter]:
    parameters: list[click.Parameter] = []
    for name, field in settings.model_fields.items():
        if name in hidden:
            continue
        if argument := _mark(field, Argument):
            many = -1 if get_origin(_core(field.annotation)) in (list, dict) else 1
            parameters.append(
                click.Argument(
                    [name],
                    nargs=many,
                    required=field.is_required(),
                    metavar=argument.metavar,
                    shell_complete=_completion(field),
                )
            )
        else:
            panel = _panel_of(settings, name) if settings.is_long else OPTIONS
            is_common = not settings.is_long or Role.COMMON in field.metadata
            parameters.append(_option(name, field, panel, is_common=is_common))
    # required options are listed first in --help
    return sorted(parameters, key=lambda p: (not isinstance(p, click.Argument), not p.required))


def key_values(pairs: Sequence[str]) -> dict[str, object]:
    """Return the mapping of `KEY=VALUE` arguments; values are read as YAML scalars.

    Raises:
        click.BadParameter: an argument without `=`.
    """
    from ..io.limited_yaml import parse_yaml  # it imports yaml, which help texts do without

    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"KEY=VALUE is needed, got {pair!r}.")
        try:
            values[key] = parse_yaml(value)
        except ValueError as error:
            raise click.BadParameter(f"the value of {key!r} must be YAML: {value!r}.") from error
    return values


def key_texts(pairs: Sequence[str]) -> dict[str, str]:
    """Return the mapping of `KEY=VALUES` arguments, the values as they are written.

    Raises:
        click.BadParameter: an argument without `=`, or a key twice.
    """
    values: dict[str, str] = {}
    for key, equals, text in (pair.partition("=") for pair in pairs):
        if not (equals and key and text) or key in values:
            raise click.BadParameter(
                f"each key must occur once, as KEY=VALUE[,VALUE...] or KEY=LOW:HIGH, got {key + equals + text!r}."
            )
        values[key] = text
    return values


def _value(value: object, field: FieldInfo) -> object:
    """Return the value of an option in the type of its field."""
    core = _core(field.annotation)
    if get_origin(core) is dict and isinstance(value, tuple):
        return key_texts(value) if get_args(core)[1] is str else key_values(value)
    return list(value) if isinstance(value, tuple) else value


def explain(error: ValidationError, settings: type[Settings]) -> str:
    """Return all faults of a set of options in one line."""
    faults = []
    for fault in error.errors():
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:  # of several options, whose values would be all of them
            faults.append("an option is missing" if fault["type"] == "missing" else message)
            continue
        name = str(fault["loc"][0])
        field = settings.model_fields.get(name)
        argument = _mark(field, Argument) if field else None
        flag = argument.metavar if argument else _flag(name, field) if field else "--" + name.replace("_", "-")
        if fault["type"] == "missing":
            faults.append(f"{flag} is needed")
        else:
            faults.append(f"{flag}: {message}, got {as_line(repr(fault['input']))}")
    return "; ".join(dict.fromkeys(faults)) + "."


def _console_options() -> list[click.Parameter]:
    """Return the options that every command has."""
    options: list[click.Parameter] = [
        click.Option(["--json", "as_json"], is_flag=True, help="print one JSON document on stdout"),
        click.Option(["--quiet"], is_flag=True, help="no text and no progress bars"),
        help_all_option(),
    ]
    return options


@contextmanager
def _as_typed(fields: Mapping[str, FieldInfo], ctx: click.Context) -> Iterator[None]:
    """Let errors name the second flag of an option, such as --target-modules, if the user typed that one."""
    typed = {part.partition("=")[0] for part in ctx.meta.get(_ARGUMENTS, ())}
    marks = {_flag(name, field): _mark(field, Flag) for name, field in fields.items()}
    others = {flag: mark.alias for flag, mark in marks.items() if mark and mark.alias in typed}

    def named(error: Exception) -> str:
        text = str(error)
        for flag, alias in others.items():
            text = re.sub(rf"{flag}(?![\w-])", str(alias), text)
        return text

    try:
        yield
    except AdapterMixError as error:
        error.args = (named(error),)
        raise
    except click.UsageError as error:
        raise click.UsageError(named(error), ctx) from error


def settings_of(schema: type[Settings], values: Mapping[str, object], ctx: click.Context) -> Settings:
    """Return the options of a command from the values that click has parsed.

    Raises:
        click.UsageError: a value is wrong, or two values contradict each other.
    """
    fields = schema.model_fields
    try:
        return schema(
            **{name: _value(value, fields[name]) for name, value in values.items() if value not in (None, ())}
        )
    except ValidationError as error:
        raise click.UsageError(explain(error, schema), ctx) from error


def click_command(record: Command) -> click.Command:
    """Return the command of a record, with an option for each field of its class of options."""
    schema = record.schema()
    fields = schema.model_fields

    def callback(*, as_json: bool, quiet: bool, **values: object) -> int | None:
        ctx = click.get_current_context()
        with _as_typed(fields, ctx):
            settings = settings_of(schema, values, ctx)
            require_inputs(settings)
            console = Console(as_json=as_json, quiet=quiet)
            show = load(f"cli.{record.show}")
            if record.run is None:
                show(settings, console)
                return None
            report = record.call(settings, watch=console.watch)
            code: int | None = show(report, settings, console)
            console.document(document_of(report))
            return code

    return VariadicCommand(
        record.name,
        callback=callback,
        params=[*_parameters(schema, record.hidden), *_console_options()],
        help=f"{inspect.getdoc(schema)}\n\n{record.notes}".strip(),
        no_args_is_help=any(field.is_required() for field in fields.values()),
    )
