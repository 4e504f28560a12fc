"""What settings of several commands share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from . import checks
from .registries import TASKS

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Standardize = Literal["none", "all", "languages"]
Layer = Annotated[int | Literal["middle", "last"], BeforeValidator(checks.layer_or_name)]
Positive = Annotated[int, Field(ge=1)]
Files = Annotated[list[str], Field(min_length=1), AfterValidator(checks.no_numbers)]
ALLOW_TESTED = (
    "take dev, training and calibration files that were evaluated as test, else refused; the manifest says so"
)
TASK = f"task: {', '.join(TASKS.own)}, or one of another package"


READ = {
    *("adapter", "adapters", "against", "base", "beside", "calibration", "candidates", "data", "dev", "dev_pairs"),
    *("dev_source", "folder", "model_a", "model_b", "on_top_of", "pairs", "source", "source_encoder", "start_from"),
    *("statistics", "systems", "texts", "train", "transfer", "tuned"),
}
"""Settings that name what a command reads: paths, globs, `LANGUAGE=FILE`, `NAME=FILE`, Hub ids."""
WRITTEN = {"out", "predictions", "plot", "csv", "markdown", "document"}
"""Settings that name what a command writes."""


class Settings(BaseModel):
    """Frozen, and strict about names; in paths `~` and `$HOME` are the home folder, as in a shell."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)

    @field_validator("*")
    @classmethod
    def _text(cls, value: Any, info: ValidationInfo) -> Any:
        kind: Literal["text", "read", "written"] = "text"
        if info.field_name in READ or info.field_name in WRITTEN:
            kind = "read" if info.field_name in READ else "written"
        if isinstance(value, str):
            return checks.text(value, kind=kind)
        if isinstance(value, list):
            return [checks.text(item, kind=kind) if isinstance(item, str) else item for item in value]
        return value


class Place(TypedDict):
    """Where and how a base model is loaded."""

    device: str
    dtype: str
    quantize: str


class Placed(Settings):
    """Where and how to compute."""

    device: checks.Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="dtype of the base model; auto is bfloat16 where the hardware has it")
    quantize: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="load the base model in 4 or 8 bits (bitsandbytes)"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")

    def place(self) -> Place:
        """Return what `load_base` must know of it."""
        return {"device": self.device, "dtype": self.dtype, "quantize": self.quantize}


class Scored(Settings):
    """How answers are scored."""

    metric: str | None = Field(
        None, description="headline metric of the task, by which systems and candidates are compared; default its first"
    )
    scorer: str | None = Field(
        None, description="whose script is followed: mlqa or squad for qa, merged (MASSIVE) or strict (xSID) for slots"
    )


class Written(Settings):
    """What is written where."""

    out: str = Field(description="output folder; appears whole or not at all")
    overwrite: bool = Field(False, description="replace an existing output of this toolkit")
    dry_run: bool = Field(False, description="check everything and show the plan; write nothing")


class GenerationSettings(Placed):
    """Greedy generation."""

    batch_size: Positive | None = Field(32, description="rows per batch")
    max_new_tokens: Positive = Field(64, description="most tokens to generate per row")
    template: str | None = Field(None, description="prompt template; default: the one the adapter was trained with")
