"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypedDict, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ..errors import InvalidValueError, near_or_known
from .fields import Device, Dtype, Positive, Quantize, check_text, columns_of, separated
from .registries import TASKS
from .roles import Flag, Panel, Reads, Role, Writes

ALLOW_TESTED = "allow dev, training and calibration files that were evaluated as test data; the manifest records them"
BASE = "base model: folder or Hub id[@REVISION]"
TASK = f"task: {', '.join(TASKS.built_in)}, or one of another package"


class Settings(BaseModel):
    """Frozen, and strict about names; in paths `~` and `$HOME` are the home folder, as in a shell."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)
    panel: ClassVar[Panel | None] = None
    """Panel of the help text for the options that a class adds; a field's own `Panel` mark counts more."""
    is_long: ClassVar[bool] = False
    """Whether --help shows options in panels, and only the common ones."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: object, info: ValidationInfo) -> object:
        """Return paths as text, and a single value of a list as a list."""
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, list | tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value]
        field = cls.model_fields[str(info.field_name)]
        is_single = isinstance(value, str | int | float) and not isinstance(value, bool)
        return [value] if is_single and _is_list(field.annotation) else value

    @field_validator("*")
    @classmethod
    def _check_text(cls, value: object, info: ValidationInfo) -> object:
        kind: Literal["text", "read", "written"] = "text"
        for mark in cls.model_fields[str(info.field_name)].metadata:
            if isinstance(mark, Reads | Writes):
                kind = "read" if isinstance(mark, Reads) else "written"
        if isinstance(value, str):
            return check_text(value, kind=kind)
        if isinstance(value, list):
            return [check_text(item, kind=kind) if isinstance(item, str) else item for item in value]
        return value

    def changed(self, names: Iterable[str]) -> list[str]:
        """Return which of these options do not have their default value, in the order of the names."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]


def _is_list(annotation: object) -> bool:
    """Return whether values of a field are lists, or lists or None."""
    members = [member for member in get_args(annotation) if member is not type(None)]
    return get_origin(annotation) is list or (len(members) == 1 and get_origin(members[0]) is list)


def refuse(*faults: tuple[bool, str]) -> None:
    """Raise the first fault that holds.

    Args:
        faults: Whether it holds, and its code and message, such as "joint.discard: drop --discard".

    Raises:
        ValueError: one of them holds.
    """
    for is_fault, fault in faults:
        if is_fault:
            code, _, message = fault.partition(": ")
            raise InvalidValueError(message, code=code)


class LoadOptions(TypedDict):
    """Arguments of `load_base`."""

    device: str
    dtype: str
    quantize: str


class Placed(Settings):
    """Where and how to compute."""

    panel = Panel.MODEL

    device: Annotated[Device, Role.MACHINE, Role.COMMON, Role.CLOSED_FORM] = Field(
        "auto", description="auto, cpu, cuda or cuda:N"
    )
    dtype: Annotated[Dtype, Role.DEV_CURVE, Role.CLOSED_FORM] = Field(
        "auto", description="dtype of the base model; auto is bfloat16 where the hardware has it"
    )
    quantize: Annotated[Quantize, Role.DEV_CURVE, Role.CLOSED_FORM] = Field(
        "none",
        description="load the base model in 4 or 8 bits of bitsandbytes; int4 (compressed-tensors) only rounds the "
        "weights, which take as much memory as before",
    )
    seed: Annotated[int, Role.CLOSED_FORM] = Field(0, ge=0, lt=2**31, description="seed of everything random")

    def load_options(self) -> LoadOptions:
        """Return the arguments of `load_base`."""
        return {"device": self.device, "dtype": self.dtype, "quantize": self.quantize}


class ReadsRows(Settings):
    """Rows of a task whose columns may have other names."""

    columns: Annotated[
        dict[str, str],
        BeforeValidator(columns_of),
        Flag(metavar="FIELD=COLUMN,..."),
        Role.DEV_CURVE,
        Role.LEARNING,
        Panel.DATA,
    ] = Field(
        {},
        description="columns or JSON fields of the task's data by other names, such as "
        "text=utt,label=intent,language=lang",
    )


class Scored(Settings):
    """How answers are scored."""

    panel = Panel.SCORES

    metric: str | None = Field(
        None, description="headline metric of the task, by which systems and candidates are compared; default its first"
    )
    scorer: str | None = Field(
        None, description="whose script is followed: mlqa or squad for qa, merged (MASSIVE) or strict (xSID) for slots"
    )


class Written(Settings):
    """The output."""

    panel = Panel.RUN

    out: Annotated[str, Writes(is_main=True), Role.CLOSED_FORM] = Field(
        description="output folder; appears whole or not at all"
    )
    overwrite: Annotated[bool, Role.HANDLING, Role.COMMON, Role.CLOSED_FORM] = Field(
        False, description="replace an existing output of this toolkit"
    )
    dry_run: Annotated[bool, Role.HANDLING, Role.COMMON, Role.CLOSED_FORM] = Field(
        False, description="check everything and show the plan; write nothing"
    )


class GenerationSettings(Placed):
    """Greedy generation."""

    panel = Panel.MODEL

    batch_size: Positive | None = Field(32, description="rows per batch")
    max_new_tokens: Positive = Field(64, description="most tokens to generate per row")
    template: str | None = Field(None, description="prompt template; default: the one the adapter was trained with")
    labels: Annotated[list[str], BeforeValidator(separated), Flag(metavar="LABEL,...")] = Field(
        [],
        description="labels of a head whose adapter lists none, such as one of plain peft, in the order of its "
        "outputs; default those of the base model's id2label",
    )


def described(error: ValidationError, schema: type[BaseModel]) -> list[tuple[str, str]]:
    """Return the option and a sentence for each fault of values for a class of options."""
    from ..io.limited_yaml import shortened  # it imports yaml, which --help does without

    faults = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if fault["type"] == "extra_forbidden":
            faults.append((name, f"unknown key {path!r}.{near_or_known(path, list(schema.model_fields))}"))
        else:
            message = fault["msg"].removeprefix("Value error, ")
            faults.append((name, f"{path}: {message}, got {shortened(fault['input'])}."))
    return faults
