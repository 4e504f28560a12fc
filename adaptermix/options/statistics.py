"""Options of measuring statistics for merge methods."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ..errors import InvalidValueError
from .base import ALLOW_TESTED, BASE, Placed, ReadsRows, Written
from .fields import Files, Positive, Rows
from .roles import ADAPTER, CALIBRATION, MODEL, Argument, Flag, Panel, Reads, Role, Writes


class StatisticsSettings(ReadsRows, Placed, Written):
    """Measure on data the statistics of an adapter that fisher or regmean need, for `merge --statistics`."""

    panel = Panel.MODEL
    is_long: ClassVar[bool] = True

    adapter: Annotated[str, Reads(ADAPTER), Argument("ADAPTER")] = Field(description="adapter folder")
    base: Annotated[str, Reads(MODEL)] = Field(description=BASE)
    data: Annotated[Files, Reads(CALIBRATION, rows="rows"), Panel.DATA] = Field(
        description="rows of the task; without --task plain texts: lines, TSV, JSONL with `text` or strings"
    )
    method: Annotated[Literal["regmean", "fisher"], Role.COMMON] = Field(
        "regmean", description="what to measure: inputs of modules (regmean), or squared gradients (fisher)"
    )
    task: Annotated[str | None, Role.COMMON, Panel.DATA] = Field(
        None, description="task of the rows, whose answers fisher needs"
    )
    rows: Annotated[Rows | None, Role.COMMON, Panel.DATA] = Field(
        None, description="START:STOP[:STEP], the rows of each file to use"
    )
    template: Annotated[str | None, Panel.DATA] = Field(
        None, description="prompt template; default: the one the adapter was trained with"
    )
    modules: Annotated[list[str], Flag(metavar="GLOB...")] = Field(
        [],
        description="globs over module paths, of other linear layers too; default those that the adapter adapts",
    )
    batch_size: Annotated[Positive, Role.UNRECORDED] = Field(16, description="rows per batch")
    seed: Annotated[int, Role.UNRECORDED] = Field(0, ge=0, lt=2**31, description="seed of everything random")
    out: Annotated[str, Writes(is_main=True), Panel.RUN] = Field(
        description="output file (.safetensors); appears whole or not at all"
    )
    overwrite: Annotated[bool, Role.HANDLING, Role.COMMON, Panel.RUN] = Field(
        False, description="replace an existing file of statistics"
    )
    allow_tested: Annotated[bool, Role.SCHEDULING, Panel.DATA] = Field(False, description=ALLOW_TESTED)
    allow_base_mismatch: bool = Field(False, description="measure on another base model than the adapter names")

    @model_validator(mode="after")
    def _check_statistics(self) -> StatisticsSettings:
        if self.method == "fisher" and self.task is None:
            raise InvalidValueError(
                "--method fisher needs rows with answers: add --task TASK", code="statistics.no-task"
            )
        if self.columns and self.task is None:
            raise InvalidValueError(
                "--columns names fields of a task: add --task, or drop it", code="statistics.columns"
            )
        if self.template and self.task is None:
            raise InvalidValueError(
                "--template is the prompt of a task: add --task, or drop it",
                code="statistics.template",
            )
        return self
