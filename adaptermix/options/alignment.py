"""Options of training on translation pairs, alone and together with a task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..errors import InvalidValueError
from .base import Settings, refuse
from .fields import Files, Layer, Rows, Standardize, check_vectors
from .roles import DEV, TRAINING, Panel, Reads, Role, marked
from .training import MOVING, TaskOptions, TrainingSettings, beyond_the_layer

Objective = Literal["contrastive", "distil", "both"]
PAIRS = "parallel pair files, such as de-en.tsv"
LAYER = "number of blocks to run: middle (n/2), last (n) or 1 to n"
RANKS = {"least-squares": 64, "mean-shift": 1}
"""Default rank of each closed form."""


class AlignOptions(Settings):
    """The alignment objective."""

    panel = Panel.OBJECTIVE

    pairs: Annotated[Files, Reads(TRAINING, "pairs", "rows"), Role.DEV_CURVE, Panel.DATA, Role.CLOSED_FORM] = Field(
        description=PAIRS
    )
    dev_pairs: Annotated[list[str], Reads(DEV, "pairs"), Role.DEV_CURVE, Panel.DATA, Role.CLOSED_FORM] = Field(
        [], description="pair files whose loss is logged, and chooses with --patience"
    )
    layer: Annotated[Layer, Role.DEV_CURVE, Role.CLOSED_FORM] = Field("middle", description=LAYER)
    objective: Objective = Field(
        "contrastive",
        description="contrastive: pull translations together and push other pairs apart (published); distil: move each "
        "sentence's states to those that the frozen base has of its translation; both: the sum",
    )
    temperature: Annotated[float, Role.CONTRAST] = Field(0.1, gt=0, description="temperature of the contrastive loss")
    symmetric: Annotated[bool, Role.CONTRAST] = Field(
        False, description="average both directions; published: source to target only"
    )
    anchor: Annotated[Literal["pair", "base"], Role.CONTRAST] = Field(
        "pair", description="targets' states: of the model in training, or of the frozen base (a fixed teacher)"
    )
    stop_gradient: Annotated[bool, Role.CONTRAST] = Field(
        False, description="train the source side only: no gradient through the targets"
    )
    pooling: Annotated[Literal["mean", "bos"], Role.CONTRAST, Role.DEV_CURVE, Role.CLOSED_FORM] = Field(
        "mean", description="sentence vector: mean over tokens, or the first token"
    )
    mask_duplicates: Annotated[bool, Role.CONTRAST] = Field(
        False, description="do not count equal target sentences as negatives"
    )
    exclude_bos: Annotated[bool, Role.DEV_CURVE, Role.CLOSED_FORM] = Field(
        False, description="leave the first special token out of the mean"
    )
    standardize: Annotated[Standardize, Role.CONTRAST, Role.DEV_CURVE] = Field(
        "none",
        description="contrast z-scores of means of unit states, over all sentences of the frozen base or those of each "
        "language: for models whose long tokens and dimensions drown the others (all cosines near 1)",
    )
    gather_negatives: Annotated[bool, Role.CONTRAST, Panel.PROCESSES] = Field(
        True,
        description="where several processes share a batch: contrast a pair with those of all processes, as a single "
        "process would; else only with those of the same process",
    )
    balance: Annotated[Literal["languages", "rows"], Panel.DATA, Role.CLOSED_FORM] = Field(
        "languages", description="draw every language pair equally often, or every row"
    )
    keeper: Annotated[float, Role.CONTRAST] = Field(
        0.0, ge=0, description="weight of a term that keeps the targets' states (English) as the frozen base has them"
    )

    @model_validator(mode="after")
    def _check_align(self) -> AlignOptions:
        if isinstance(self.layer, int) and self.layer > 0:
            # joint training has a task too, whose loss runs all blocks
            whole = hasattr(self, "task")
            if fault := beyond_the_layer(getattr(self, "blocks", None), self.layer, whole=whole):
                raise InvalidValueError(fault, code="align.blocks")
        check_vectors(exclude_bos=self.exclude_bos, pooling=self.pooling)
        if self.stop_gradient and self.anchor == "base":
            raise InvalidValueError(
                "--anchor base has no gradient through the targets anyway: drop --stop-gradient", code="align.anchor"
            )
        if self.objective == "distil" and getattr(self, "fit", None) not in RANKS:
            only = marked(self, Role.CONTRAST)
            if changed := self.changed(name for name in type(self).model_fields if name in only):
                raise InvalidValueError(
                    f"--{changed[0].replace('_', '-')} is for the contrastive objective, which --objective distil "
                    "does not use: drop it, or use --objective both",
                    code="align.contrastive-only",
                )
        return self


class AlignSettings(AlignOptions, TrainingSettings):
    """Train a stand-alone alignment LoRA at a middle layer, or compute it in closed form."""

    panel = Panel.OBJECTIVE

    dev_pairs: Annotated[list[str], Reads(DEV, "pairs"), Role.DEV_CURVE, Role.COMMON, Panel.DATA, Role.CLOSED_FORM] = (
        Field([], description="pair files whose loss is logged, and chooses with --patience")
    )
    layer: Annotated[Layer, Role.DEV_CURVE, Role.COMMON, Role.CLOSED_FORM] = Field("middle", description=LAYER)
    objective: Annotated[Objective, Role.COMMON] = Field(
        "distil",
        description="the objective: the states that the frozen base has of the translation (distil), translations "
        "close together and other pairs apart (contrastive, as published), or both; contrastive is the default with "
        "one of its options, such as --temperature",
    )
    fit: Annotated[Literal["gradient", "least-squares", "mean-shift"], Role.CLOSED_FORM] = Field(
        "gradient",
        description="gradient: train the LoRA; least-squares: compute it without training, for one layer, so that the "
        "frozen base's states of sources move to those of their translations (default rank 64); mean-shift: the same "
        "constant move for all states, their mean distance",
    )
    batch_size: Annotated[int, Field(ge=2), Role.DEV_CURVE, Role.COMMON, Panel.OPTIMISER, Role.CLOSED_FORM] = Field(
        32,
        description="pairs per batch; for the contrastive objective the others of a batch are the negatives, also with "
        "--accumulate",
    )
    rows: Annotated[Rows | None, Role.DEV_CURVE, Panel.DATA, Role.CLOSED_FORM] = Field(
        None, description="START:STOP[:STEP], the rows of each file to use"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_objective(cls, values: object) -> object:
        """Choose the contrastive objective if no objective is set but an option is that only this one has."""
        if not isinstance(values, dict) or values.get("objective") or values.get("fit") in RANKS:
            return values
        # a base that has lost a part of its weights to the LoRA cannot be the teacher of a distillation
        contrasts = bool(marked(cls, Role.CONTRAST) & set(values)) or values.get("init") in MOVING
        return {**values, "objective": "contrastive"} if contrasts else values

    @model_validator(mode="before")
    @classmethod
    def _default_rank(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("rank") is None and values.get("fit") in RANKS:
            return {**values, "rank": RANKS[values["fit"]]}
        return values

    @model_validator(mode="after")
    def _check_fit(self) -> AlignSettings:
        if self.fit not in RANKS:
            return self
        used = marked(self, Role.CLOSED_FORM)
        if changed := self.changed(name for name in type(self).model_fields if name not in used):
            option = changed[0].replace("_", "-")
            raise InvalidValueError(
                f"--{option} is an option of training, and --fit {self.fit} does not train: drop one",
                code="align.fit-option",
            )
        if self.fit == "mean-shift" and self.rank != 1:
            raise InvalidValueError(
                f"--fit mean-shift adds one vector, a LoRA of rank 1, got --rank {self.rank}: drop --rank",
                code="align.fit-rank",
            )
        return self


class JointSettings(TaskOptions, AlignOptions, TrainingSettings):
    """Train one LoRA for a task and for alignment, the two taking turns."""

    panel = Panel.OBJECTIVE

    batch_size: Annotated[int, Field(ge=2), Role.DEV_CURVE, Role.COMMON, Panel.OPTIMISER] = Field(
        32, description="rows, and pairs, per batch"
    )
    pairs: Annotated[Files, Reads(TRAINING, "pairs", "pair_rows"), Role.DEV_CURVE, Panel.DATA] = Field(
        description=PAIRS
    )
    pair_rows: Annotated[Rows | None, Panel.DATA] = Field(
        None, description="START:STOP[:STEP], the rows of each pair file to use"
    )
    alternate: Annotated[Literal["step", "batch", "sum"], Role.DEV_CURVE] = Field(
        "step",
        description="whose turn it is: another objective every optimizer step (paper), every batch (release), or "
        "both summed",
    )
    align_weight: float = Field(1.0, ge=0, description="weight of the alignment loss")
    discard: Annotated[bool, Role.DEV_CURVE] = Field(
        False, description="skip the rows of the objective whose turn it is not, as the release does"
    )
    select: Literal["task", "align", "sum"] = Field(
        "task", description="dev loss that --patience follows; the release takes the sum"
    )

    @model_validator(mode="after")
    def _check_joint(self) -> JointSettings:
        refuse(
            (
                self.select != "task" and not self.dev_pairs,
                f"joint.select-pairs: --select {self.select} needs dev pairs: add --dev-pairs FILE",
            ),
            (
                bool(self.select != "align" and self.patience and not self.dev),
                f"joint.select-dev: --select {self.select} needs dev files of the task: add --dev "
                "FILE, or --select align",
            ),
            (
                self.select != "task" and not self.patience,
                f"joint.select-patience: --select {self.select} chooses the dev loss that --patience looks at, and it "
                "is not given: add --patience N or drop --select",
            ),
            (
                self.discard and self.alternate == "sum",
                "joint.discard: --alternate sum uses every row of both objectives: drop --discard",
            ),
        )
        return self
