"""Settings of training a fusion with source texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .. import checks
from .base import Files
from .training import TaskSettings

FusionName = Literal["add", "mul", "add-relu", "mul-relu", "gated", "cross-attention", "cross-attention-paper"]


class FusionSettings(TaskSettings):
    """Train a task LoRA whose bottleneck fuses each text with its source in another language (FLARE)."""

    source: Files = Field(description="the training rows in the source language: row i beside row i of --train")
    dev_source: list[str] = Field([], description="the dev rows in the source language")
    fusion: FusionName = Field("add", description="how the two down-projections become one")
    alignment: Literal["position", "end", "index", "soft"] = Field(
        "position",
        description="which source token is beside a target token: counted from the first or last of both, place by "
        "place with padding (release), or learned",
    )
    source_norm: bool = Field(
        True, description="take source states behind the norm that stands before a module; off: the residual stream"
    )
    source_offset: Literal[0, 1] = Field(
        0, description="states that go into a block (0, release) or come out (1, paper)"
    )
    source_pads: bool = Field(False, description="fuse padding of sources too, as the release does")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ["auto"], description="names of the modules to adapt; auto: those of queries and values"
    )

    _sound_fusion = model_validator(mode="after")(checks.sound_fusion)

    def peft_settings(self) -> dict[str, Any]:
        """Return the settings of the fusion, by PEFT's names."""
        return {
            "fusion": self.fusion,
            "fusion_alignment": self.alignment,
            "fusion_norm": self.source_norm,
            "fusion_offset": self.source_offset,
            "fusion_pads": self.source_pads,
        }
