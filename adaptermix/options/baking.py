"""Options of writing adapters into their base model."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from .base import ALLOW_TESTED, ReadsRows, Scored, Written, refuse
from .fields import Device, Quantize, Rows, StorageDtype
from .registries import STRATEGIES, one_of
from .roles import ADAPTER, CALIBRATION, DEV, MODEL, Panel, Reads, Role


class BakeSettings(ReadsRows, Scored, Written):
    """Write adapters into their base model, in 16, 8 or 4 bits, and measure how much of their effect is kept."""

    panel = Panel.BAKE
    is_long: ClassVar[bool] = True

    base: Annotated[str, Reads(MODEL), Panel.MODEL] = Field(
        description="base model, quantised or not, or a stack: folder or Hub id[@REVISION]"
    )
    adapter: Annotated[list[str], Reads(ADAPTER), Role.COMMON] = Field(
        [], description="adapter folders; several are added; a stack can be baked without one, for its own LoRA"
    )
    quantize: Annotated[Quantize, Role.COMMON] = Field(
        "none",
        description="format of the base that the adapter was trained on or will run on: unquantised, or in 4 or 8 bits",
    )
    strategy: Annotated[str, one_of("auto", "keep", "merge-16", "dequant-16", STRATEGIES), Role.COMMON] = Field(
        "auto",
        description="how the adapter gets into the weights; auto takes for each module what keeps enough with the "
        "least error, else 16 bits, and is merge-16 without --quantize; residual adds a small LoRA to the codes; keep "
        "writes one adapter for an unchanged base",
    )
    calibration: Annotated[list[str], Reads(CALIBRATION, "texts"), Role.COMMON, Panel.DATA] = Field(
        [], description="text files, as the model will see: lines, TSV, JSONL with `text` or strings"
    )
    keep_at_least: Annotated[float, Role.STRATEGY] = Field(
        0.9,
        ge=0,
        le=1,
        description="refuse if less than this share of the adapter's effect is kept: on held-out texts, or on weights "
        "without --calibration; 0 takes anything",
    )
    error_at_most: Annotated[float, Role.STRATEGY] = Field(
        0.5,
        gt=0,
        description="for auto and residual: largest error of the change of a module's outputs, relative to that change",
    )
    task: Annotated[str | None, Role.AFTERWARDS, Role.COMMON, Panel.DATA] = Field(
        None, description="task to score the result on, and the unmerged adapters too"
    )
    dev: Annotated[list[str], Reads(DEV, rows="rows"), Role.AFTERWARDS, Role.COMMON, Panel.DATA] = Field(
        [], description="dev files of the task"
    )
    rows: Annotated[Rows | None, Role.AFTERWARDS, Panel.DATA] = Field(
        None, description="START:STOP[:STEP], the rows of each dev file to use"
    )
    max_new_tokens: Annotated[int, Role.AFTERWARDS, Panel.DATA] = Field(
        64, ge=1, description="most tokens to generate per row of the task"
    )
    dtype: StorageDtype | None = Field(
        None, description="storage dtype of tensors that are not quantised; default as in the base"
    )
    shard_size: Annotated[str, Role.AFTERWARDS] = Field(
        "2GB", description="size that no weight file exceeds, unless a single tensor does"
    )
    device: Annotated[Device, Role.MACHINE, Role.COMMON, Panel.MODEL] = Field(
        "auto", description="where to compute: auto, cpu, cuda or cuda:N"
    )
    seed: Annotated[int, Role.STRATEGY, Panel.RUN] = Field(
        0, ge=0, lt=2**31, description="seed of the stochastic strategy"
    )
    allow_tested: Annotated[bool, Role.SCHEDULING, Panel.DATA] = Field(False, description=ALLOW_TESTED)
    without_heads: bool = Field(
        False, description="leave heads (fully trained tensors) out: for a base that further adapters are trained on"
    )
    allow_base_mismatch: bool = Field(False, description="bake an adapter that names another base model")

    @model_validator(mode="after")
    def _check_bake(self) -> BakeSettings:
        chooses = self.quantize != "none" and self.strategy in ("auto", "calibrated", "residual")
        refuse(
            (
                self.quantize == "none" and self.strategy not in ("auto", "merge-16", "keep"),
                f"bake.strategy-unquantized: --strategy {self.strategy} is about a quantised base: add --quantize "
                "nf4, or drop it",
            ),
            (
                self.strategy == "keep" and bool(self.task or self.calibration),
                "bake.keep-options: --strategy keep is exact, so --task and --calibration have no effect: "
                "leave them out",
            ),
            (
                bool(self.task) != bool(self.dev),
                "bake.dev-score: a dev score needs a task and its data: give --task and --dev together",
            ),
            (
                chooses and not self.calibration,
                f"bake.no-calibration: --strategy {self.strategy} chooses codes for the inputs that occur: give texts "
                "with --calibration",
            ),
        )
        return self
