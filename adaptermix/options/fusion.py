"""Settings of training a fusion with source texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from . import checks
from .base import Layer
from .roles import DEV, TRAINING, Reads
from .training import TaskSettings

FusionName = Literal[
    "add",
    "mul",
    "add-relu",
    "mul-relu",
    "gated",
    "cross-attention",
    "cross-attention-paper",
    "x-mixup",
    "input",
]


class FusionSettings(TaskSettings):
    """Train a task LoRA that sees each text beside its source in another language (FLARE, and its rivals)."""

    source: Annotated[list[str], Reads(TRAINING, rows="rows")] = Field(
        [],
        description="the training rows in the source language: row i beside row i of --train; one file may stand "
        "beside several",
    )
    dev_source: Annotated[list[str], Reads(DEV)] = Field([], description="the dev rows in the source language")
    source_encoder: str | None = Field(
        None,
        description="take sources from another encoder, such as that of a translation model, through a trained "
        "projection (FLARE-MT); it reads the rows themselves, or those of --source where they are given",
    )
    source_tag: str | None = Field(
        None,
        description="language tag of all texts that the source encoder reads; default that of each text's language",
    )
    fusion: FusionName = Field(
        "add",
        description="how the two down-projections become one; x-mixup mixes states in one block instead, input puts "
        "the source before the text (a plain LoRA)",
    )
    alignment: Literal["position", "end", "row-end", "last", "index", "soft"] = Field(
        "position",
        description="which source token is beside a target token: counted from the first or last of both, from the "
        "last of the whole row with its answer, the last one beside all, place by place with padding, or learned",
    )
    source_norm: bool = Field(
        True, description="take source states behind the norm that stands before a module; off: the residual stream"
    )
    source_offset: int = Field(
        0, ge=0, le=1, description="states that go into a block (0, release) or come out (1, paper)"
    )
    source_pads: bool = Field(False, description="fuse padding of sources too, as the release does")
    source_dropout: bool = Field(
        False, description="read sources with the base's dropout in training, as the release does"
    )
    mixup_layer: Layer = Field("middle", description="of x-mixup: block where states are mixed, 1 to n, middle or last")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ["auto"], description="names of the modules to adapt; auto: those of queries and values"
    )

    _sound_fusion = model_validator(mode="after")(checks.sound_fusion)

    def peft_settings(self) -> dict[str, Any]:
        """Return the settings of the fusion, by PEFT's names; none where the LoRA is a plain one."""
        if self.fusion == "input":
            return {}
        return {
            "fusion": self.fusion,
            "fusion_alignment": self.alignment,
            "fusion_norm": self.source_norm,
            "fusion_offset": self.source_offset,
            "fusion_pads": self.source_pads,
            "fusion_dropout": self.source_dropout,
            "fusion_encoder": self.source_encoder,
            "fusion_tag": self.source_tag,
        }
