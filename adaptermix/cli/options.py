"""Command-line options made from the settings of a command, so that the two cannot drift apart."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..errors import shown
from ..io.limited_yaml import parse_yaml
from ..options import Settings
from ..options.registries import OneOf
from .console import Console

_POSITIONAL = {
    "adapters": "ADAPTER...",
    "folder": "DIR",
    "repo": "REPO",
    "model_a": "MODEL_A",
    "model_b": "MODEL_B",
    "names": "[NAME...]",
    "systems": "NAME=FILE...",
}
_METAVARS = {"targets": "NAME...", "layers": "N...", "modules": "GLOB...", "include": "GLOB...", "exclude": "GLOB..."}
_METAVARS |= {"supervised": "LANG...", "aligned": "LANG...", "groups": "N|GLOB...", "vary": "KEY=VALUES..."}
_NAMES = {"options": "--set"}
_SCALARS: dict[Any, Any] = {int: click.INT, float: click.FLOAT, str: click.STRING}


class VariadicCommand(click.Command):
    """Lets `--pairs a.tsv b.tsv` stand for `--pairs a.tsv --pairs b.tsv`; values end at the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option's name before each of its further values."""
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

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Split at commas."""
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"numbers parted by commas are needed, such as 0.5,0.7,0.9, got {value!r}.", param, ctx)


def _core(annotation: Any) -> Any:
    """Strip Annotated and `| None`."""
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _core(members[0])
        return str  # such as int | "middle": the settings decide
    return annotation


def _kind(annotation: Any) -> dict[str, Any]:
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


def _text(default: Any) -> str:
    """Return a default as a person would type it."""
    if not isinstance(default, list):
        return str(default)
    numbers = all(isinstance(value, float) for value in default)
    return ",".join(f"{value:g}" for value in default) if numbers else " ".join(default)


def _option(name: str, field: FieldInfo) -> click.Option:
    flag = _NAMES.get(name, "--" + name.replace("_", "-"))
    help_text = field.description or ""
    if not field.is_required() and field.default not in (None, False, [], {}):
        default = _text(field.default)
        help_text += f"  [default: {default}]"
    kind = _kind(field.annotation)
    if field.default is True:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
        help_text = help_text.replace("[default: True]", "[default: yes]")
    if names := next((mark.choices for mark in field.metadata if isinstance(mark, OneOf)), None):
        kind["metavar"] = f"[{'|'.join(names)}]"  # other packages may add to them, so the options check the value
    if name in _METAVARS and kind.get("multiple"):
        kind["metavar"] = _METAVARS[name]
    return click.Option([flag, name], required=field.is_required(), default=None, help=help_text, **kind)


def _parameters(settings: type[Settings], hidden: Sequence[str], arguments: Mapping[str, str]) -> list[click.Parameter]:
    parameters: list[click.Parameter] = []
    for name, field in settings.model_fields.items():
        if name in hidden:
            continue
        if name in arguments:
            many = -1 if get_origin(_core(field.annotation)) is list else 1
            needed = field.is_required()
            parameters.append(click.Argument([name], nargs=many, required=needed, metavar=arguments[name]))
        else:
            parameters.append(_option(name, field))
    # what must be given comes first in --help
    return sorted(parameters, key=lambda p: (not isinstance(p, click.Argument), not p.required))


def key_values(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the mapping of `KEY=VALUE` arguments; values are read as YAML scalars.

    Raises:
        click.BadParameter: an argument without `=`.
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"KEY=VALUE is needed, got {pair!r}.")
        try:
            found[key] = parse_yaml(value)
        except ValueError as error:
            raise click.BadParameter(f"the value of {key!r} must be YAML: {value!r}.") from error
    return found


def key_texts(pairs: Sequence[str]) -> dict[str, str]:
    """Return the mapping of `KEY=VALUES` arguments, the values as they are written.

    Raises:
        click.BadParameter: an argument without `=`, or a key twice.
    """
    found: dict[str, str] = {}
    for key, equals, text in (pair.partition("=") for pair in pairs):
        if not (equals and key and text) or key in found:
            raise click.BadParameter(
                "KEY=VALUE[,VALUE...] is needed, or KEY=LOW:HIGH, and a key is given once; got "
                f"{key + equals + text!r}."
            )
        found[key] = text
    return found


_MAPPINGS: dict[str, Callable[[Sequence[str]], dict[str, Any]]] = {"options": key_values, "vary": key_texts}


def explain(error: ValidationError) -> str:
    """Return all faults of a set of options in one line."""
    faults = []
    for fault in error.errors():
        name = str(fault["loc"][0]) if fault["loc"] else "the options"
        place = _POSITIONAL.get(name) or (_NAMES.get(name, "--" + name.replace("_", "-")) if fault["loc"] else name)
        if fault["type"] == "missing":
            faults.append(f"{place} is needed")
        elif not fault["loc"]:  # of several options, whose values would be all of them
            faults.append(fault["msg"].removeprefix("Value error, "))
        else:
            faults.append(f"{place}: {fault['msg'].removeprefix('Value error, ')}, got {shown(repr(fault['input']))}")
    return "; ".join(dict.fromkeys(faults)) + "."


def console_options() -> list[click.Parameter]:
    """Return the options that every command has."""
    return [
        click.Option(["--json", "as_json"], is_flag=True, help="print one JSON document on stdout"),
        click.Option(["--quiet"], is_flag=True, help="no text and no progress bars"),
    ]


def settings_command(
    settings: type[Settings],
    *,
    name: str,
    text: str,
    hidden: Sequence[str] = (),
    arguments: Mapping[str, str] = _POSITIONAL,
    cls: type[VariadicCommand] = VariadicCommand,
) -> Callable[[Callable[[Any, Console], None]], click.Command]:
    """Make a command whose options are the fields of its settings.

    Args:
        settings: The settings' class.
        name: Name of the command.
        text: Further text for its help.
        hidden: Fields that recipes have and the command line does not.
        arguments: Fields that are given without an option, and what they are called.
        cls: Class of the command.
    """

    def make(body: Callable[[Any, Console], None]) -> click.Command:
        def callback(*, as_json: bool, quiet: bool, **given: Any) -> None:
            values: dict[str, Any] = {}
            for key, value in given.items():
                if value is None or value == ():
                    continue
                if key in _MAPPINGS:
                    values[key] = _MAPPINGS[key](value)
                else:
                    values[key] = list(value) if isinstance(value, tuple) else value
            try:
                resolved = settings(**values)
            except ValidationError as error:
                raise click.UsageError(explain(error), click.get_current_context()) from error
            body(resolved, Console(as_json=as_json, quiet=quiet))

        return cls(
            name,
            callback=callback,
            params=[*_parameters(settings, hidden, arguments), *console_options()],
            help=f"{settings.__doc__}\n\n{text}".strip(),
            no_args_is_help=any(field.is_required() for field in settings.model_fields.values()),
        )

    return make
