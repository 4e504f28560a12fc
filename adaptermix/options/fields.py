"""Types of options, and the checks of single values."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ..errors import InvalidValueError
from .registries import FORMATS, one_of

ROWS = re.compile(r"(?P<start>\d{0,18}):(?P<stop>\d{0,18})(?::(?:0{0,18}(?P<step>[1-9]\d{0,17}))?)?")
"""`START:STOP` or `START:STOP:STEP`, each of which may be missing."""
_HOME = re.compile(r"((?:[^/=]*=)?)((?:~[\w.-]*|\$HOME)(?=/|$))?(.*)", re.DOTALL)
"""The name before `=` if there is one, the home folder, and the rest."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
HEAD_LAYERS = re.compile(r"last|\d+|last\+(?:\d+|search)")
_BLOCKS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")


def check_text(value: str, *, kind: Literal["text", "read", "written"]) -> str:
    """Return a text of the settings; in a path that starts with `~` or `$HOME` these are the home folder.

    Raises:
        ValueError: no file name can hold it, or it starts with a shell variable that is not replaced.
    """
    try:
        if b"\0" in os.fsencode(value):
            raise InvalidValueError("must not hold a NUL character", code="option.nul")
    except UnicodeEncodeError as error:
        raise InvalidValueError(
            f"must be text, and holds a lone surrogate ({error.object[error.start]!a})", code="option.surrogate"
        ) from error
    if kind == "text":
        return value
    match = _HOME.fullmatch(value)
    if match and match[2]:
        value = f"{match[1]}{os.path.expanduser(match[2].replace('$HOME', '~'))}{match[3]}"
    if kind == "written" and re.match(r"\$\w", value):
        raise InvalidValueError(
            "must be a path, and variables of the shell other than $HOME are not replaced here", code="option.variable"
        )
    return value


def _block_text(value: object) -> object:
    """Return `FIRST-LAST` for a range of blocks, or for one number, as text or as YAML reads it."""
    match = _BLOCKS.fullmatch(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if value is not None and (match is None or int(match[2] or match[1]) < int(match[1])):
        raise InvalidValueError("FIRST-LAST is needed, such as 0-15, or one number", code="option.layers")
    return None if match is None else f"{int(match[1])}-{int(match[2] or match[1])}"


def _rows_text(value: object) -> object:
    if value is not None and not (isinstance(value, str) and ROWS.fullmatch(value)):
        raise InvalidValueError(
            "START:STOP is needed, or with :STEP, in whole numbers, such as 0:300, 500: or ::10", code="option.rows"
        )
    return value


def _device_text(value: object) -> object:
    if not (isinstance(value, str) and _DEVICE.fullmatch(value)):
        raise InvalidValueError("auto, cpu, cuda or cuda:N is needed", code="option.device")
    return value


def _number(value: object) -> object:
    """Return a whole number that is written as text; any other value unchanged."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def rank_or_auto(value: object) -> object:
    """Return a rank as a number, also from text; `auto` and None unchanged."""
    number = _number(value)
    if value in (None, "auto") or (type(number) is int and number >= 1):
        return number
    raise InvalidValueError("a whole number of at least 1, or auto, is needed", code="option.rank")


def _layer_or_name(value: object) -> object:
    """Return a layer as a number, also from text; `middle` and `last` unchanged."""
    number = _number(value)
    if value in ("middle", "last") or type(number) is int:
        return number
    raise InvalidValueError("a whole number, middle or last is needed", code="option.layer")


def _head_layers(value: object) -> object:
    """Return the layers that a head reads as text, also from a number."""
    text = str(value) if type(value) is int else value
    if not (isinstance(text, str) and HEAD_LAYERS.fullmatch(text)):
        raise InvalidValueError(
            "last, a number of a block (6), last+6 or last+search is needed", code="option.head-layers"
        )
    return text


def columns_of(value: object) -> object:
    """Return the mapping of `text=utt,label=intent`, also from such texts in a list or in a mapping."""
    if isinstance(value, dict):
        value = [f"{name}={column}" for name, column in value.items()]
    if not isinstance(value, str | list | tuple):
        return value
    parts = [part for text in ([value] if isinstance(value, str) else value) for part in str(text).split(",")]
    columns: dict[str, str] = {}
    for name, equals, column in (part.strip().partition("=") for part in parts):
        if not (equals and name and column) or name in columns:
            raise InvalidValueError(
                "FIELD=COLUMN is needed for each field once, such as text=utt,label=intent,language=lang",
                code="option.columns",
            )
        columns[name.strip()] = column.strip()
    return columns


def separated(value: object) -> object:
    """Return a text with commas, alone or as the only one of a list, as the list of its parts."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def no_numbers(files: list[str]) -> list[str]:
    """Refuse numbers instead of files or folders: `--weights 0.5 0.5` leaves the second one over."""
    for name in files:
        try:
            float(name)
        except ValueError:
            continue
        if not Path(name).exists():
            raise InvalidValueError(
                f"{name!r} is neither a file nor a folder; the numbers of one option are separated by commas, "
                "such as --weights 0.5,0.5",
                code="option.not-numbers",
            )
    return files


def check_vectors(*, exclude_bos: bool, pooling: str) -> None:
    """Refuse to take a token and to leave it out.

    Raises:
        ValueError: both are set.
    """
    if exclude_bos and pooling == "bos":
        raise InvalidValueError(
            "--exclude-bos leaves out the token that --pooling bos takes: drop one", code="pooling.exclude-bos"
        )


Blocks = Annotated[str, BeforeValidator(_block_text)]
HeadPooling = Literal["auto", "mean", "first", "last"]
Aggregate = Literal["aff", "se", "add", "mean", "concat"]
Gate = Literal["both", "local", "global"]
HeadNorm = Literal["own", "final", "none"]
HeadLayers = Annotated[str, BeforeValidator(_head_layers)]
Rows = Annotated[str, BeforeValidator(_rows_text)]
Device = Annotated[str, BeforeValidator(_device_text)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Layer = Annotated[int | Literal["middle", "last"], BeforeValidator(_layer_or_name)]
Positive = Annotated[int, Field(ge=1)]
Quantize = Annotated[str, one_of("none", FORMATS)]
Standardize = Literal["none", "all", "languages"]
StorageDtype = Literal["float32", "bfloat16", "float16"]
Files = Annotated[list[str], Field(min_length=1), AfterValidator(no_numbers)]


def block_range(text: str) -> range:
    """Return the numbers of the blocks of `FIRST-LAST`, both included."""
    first, last = text.split("-")
    return range(int(first), int(last) + 1)
