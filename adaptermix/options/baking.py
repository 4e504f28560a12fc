"""Settings of writing adapters into their base model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from . import checks
from .base import ALLOW_TESTED, Files, Scored, Written
from .roles import CALIBRATION, DEV, Reads


class BakeSettings(Scored, Written):
    """Write adapters into their base model, in 16, 8 or 4 bits, and measure what is left of them."""

    base: str = Field(
        description="base model, quantised by bitsandbytes or not: folder or Hub id, with @REVISION if wanted"
    )
    adapter: Files = Field(description="adapter folders; several are added")
    quantize: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="what the adapter was trained on, or will run on: the base as it is, or in 4 or 8 bits"
    )
    strategy: Literal[
        "auto", "keep", "merge-16", "dequant-16", "requantize", "stochastic", "calibrated", "residual"
    ] = Field(
        "auto",
        description="how; auto takes for each module what keeps enough with the least error, else 16 bits, and is "
        "merge-16 without --quantize; residual puts a small LoRA beside the codes; keep writes one adapter for a base "
        "that stays as it is",
    )
    calibration: Annotated[list[str], Reads(CALIBRATION, "texts")] = Field(
        [], description="text files, as the model will see: lines, TSV, JSONL with `text` or strings"
    )
    keep_at_least: float = Field(
        0.9,
        ge=0,
        le=1,
        description="refuse if less than this share of the adapter's effect is kept: on held-out texts, or on weights "
        "without --calibration; 0 takes anything",
    )
    error_at_most: float = Field(
        0.5,
        gt=0,
        description="for auto and residual: how far off a module's change of outputs may be, in units of what is meant",
    )
    task: str | None = Field(None, description="task to score the result on, beside the unmerged adapters")
    dev: Annotated[list[str], Reads(DEV, rows="rows")] = Field([], description="dev files of the task")
    rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each dev file to use")
    max_new_tokens: int = Field(64, ge=1, description="most tokens to generate per row of the task")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="storage dtype of what is not quantised; default that of each of the base's tensors"
    )
    shard_size: str = Field("2GB", description="size that no weight file exceeds, unless a single tensor does")
    device: checks.Device = Field("auto", description="where to compute: auto, cpu, cuda or cuda:N")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the stochastic strategy")
    allow_tested: bool = Field(False, description=ALLOW_TESTED)
    without_heads: bool = Field(
        False, description="leave heads (fully trained tensors) out: for a base that further adapters are trained on"
    )
    allow_base_mismatch: bool = Field(False, description="bake an adapter that names another base model")

    _sound_bake = model_validator(mode="after")(checks.sound_bake)
