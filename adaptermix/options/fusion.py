"""Options of training a fusion with source texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .base import refuse
from .fields import Layer
from .registries import FUSIONS, one_of
from .roles import DEV, MODEL, TRAINING, Flag, Panel, Reads, Role, marked
from .training import TaskSettings

FusionName = Annotated[str, one_of(FUSIONS, "x-mixup", "input")]


class FusionSettings(TaskSettings):
    """Train a task LoRA that sees each text with its source in another language (FLARE, and its rivals)."""

    panel = Panel.OBJECTIVE

    source: Annotated[list[str], Reads(TRAINING, rows="rows"), Role.COMMON, Panel.DATA] = Field(
        [],
        description="the training rows in the source language: row i belongs to row i of --train; one file may "
        "belong to several",
    )
    dev_source: Annotated[list[str], Reads(DEV), Panel.DATA] = Field(
        [], description="the dev rows in the source language"
    )
    source_encoder: Annotated[str | None, Reads(MODEL), Role.BOTTLENECK] = Field(
        None,
        description="take sources from another encoder, such as that of a translation model, through a trained "
        "projection (FLARE-MT); it reads the rows themselves, or those of --source, if set",
    )
    source_tag: Annotated[str | None, Role.BOTTLENECK] = Field(
        None,
        description="language tag of all texts that the source encoder reads; default the tag of each text's language",
    )
    fusion: Annotated[FusionName, Role.COMMON] = Field(
        "add",
        description="how the two down-projections become one; x-mixup mixes states in one block instead, input puts "
        "the source before the text (a plain LoRA)",
    )
    alignment: Annotated[Literal["position", "end", "row-end", "last", "index", "soft"], Role.BOTTLENECK] = Field(
        "position",
        description="source token that belongs to a target token: counted from the first or last of both, from the "
        "last of the whole row with its answer, the last one for all, by index with padding, or learned",
    )
    source_norm: Annotated[bool, Role.BOTTLENECK] = Field(
        True, description="take source states after the norm that precedes a module; off: the residual stream"
    )
    source_offset: Annotated[int, Role.BOTTLENECK] = Field(
        0, ge=0, le=1, description="states before a block (0, release) or after it (1, paper)"
    )
    source_pads: Annotated[bool, Role.BOTTLENECK] = Field(
        False, description="fuse padding of sources too, as the release does"
    )
    source_dropout: Annotated[bool, Role.BOTTLENECK] = Field(
        False, description="read sources with the base's dropout in training, as the release does"
    )
    mixup_layer: Layer = Field(
        "middle", description="for x-mixup: block where states are mixed, 1 to n, middle or last"
    )
    targets: Annotated[
        list[str], Field(min_length=1), Flag(alias="--target-modules", metavar="NAME..."), Panel.LORA
    ] = Field(["auto"], description="names of the modules to adapt; auto: those of queries and values")

    @model_validator(mode="after")
    def _check_fusion(self) -> FusionSettings:
        read = bool(self.source_encoder)  # it can read the rows themselves
        whole = self.fusion in ("input", "x-mixup")
        only = marked(self, Role.BOTTLENECK)
        moved = self.changed(name for name in type(self).model_fields if name in only)
        refuse(
            (
                not self.source and not read,
                "fusion.no-source: rows need sources: give --source, or --source-encoder for an encoder that reads "
                "the rows themselves",
            ),
            (
                bool(self.dev_source) != bool(self.dev and self.source),
                "fusion.no-dev-source: dev rows need sources as training rows do: give --dev and --dev-source together",
            ),
            (
                self.shard_base,
                "fusion.shard-base: --shard-base requires the same number of passes in every process, which fusion "
                "does not guarantee: drop it",
            ),
            (
                read and not (self.source_norm and self.source_offset == 0 and not self.source_dropout),
                "fusion.encoder-options: --source-norm, --source-offset and --source-dropout are about the base's "
                "own states: drop them, or --source-encoder",
            ),
            (
                self.fusion.startswith("cross-attention") and self.alignment != "position",
                f"fusion.alignment: --fusion {self.fusion} attends to the whole source and ignores "
                "--alignment: drop it",
            ),
            (
                bool(self.source_tag) and not read,
                "fusion.tag-without-encoder: --source-tag is about --source-encoder: leave it out",
            ),
            (
                whole and bool(moved),
                f"fusion.option: --fusion {self.fusion} does not use --{(moved or [''])[0].replace('_', '-')}: drop it",
            ),
            (
                self.mixup_layer != "middle" and self.fusion != "x-mixup",
                "fusion.mixup-layer: --mixup-layer is about --fusion x-mixup",
            ),
            (
                self.gradient_checkpointing and self.fusion == "x-mixup",
                "fusion.checkpointing: --gradient-checkpointing does not go with --fusion x-mixup: leave it out",
            ),
            (self.dora, "fusion.dora-option: --dora changes weights, a fusion does not: leave one out"),
            (self.compile, "fusion.compile: --compile does not go with a fusion: leave it out"),
            (
                bool(self.on_top_of or self.start_from),
                "fusion.start-from: a fusion cannot start from an adapter: leave --on-top-of and --start-from out, and "
                "bake an earlier stage into the base (bake --without-heads)",
            ),
            (
                self.norm_budget is not None,
                "fusion.norm-budget: --norm-budget limits changes of weights, which a fusion does not make",
            ),
            (self.init not in ("kaiming", "gaussian"), "fusion.init: --init must be kaiming or gaussian for a fusion"),
            (self.lora_plus != 1, "fusion.lora-plus: --lora-plus does not go with a fusion: leave it out"),
        )
        return self

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
