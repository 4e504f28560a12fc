"""Options of the training commands."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from ..errors import InvalidValueError
from .base import ALLOW_TESTED, BASE, TASK, Placed, ReadsRows, Written, refuse
from .fields import Aggregate, Blocks, Files, Gate, HeadLayers, HeadNorm, HeadPooling, Positive, Rows, block_range
from .registries import HEADS, one_of
from .roles import ADAPTER, DEV, MODEL, TRAINING, Flag, Panel, Reads, Role


def _peft_init(value: object) -> object:
    """Return the name of PEFT's default, which PEFT writes as `true`; any other value unchanged."""
    return "kaiming" if value is True or value == "true" else value


Init = Annotated[Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"], BeforeValidator(_peft_init)]
MOVING = ("pissa", "olora")
"""Values of `init` that move a part of the base's weights into the LoRA."""


def beyond_the_layer(blocks: str | None, layer: int, *, whole: bool) -> str | None:
    """Return the fault of adapted blocks for a loss at a layer, or None.

    Args:
        blocks: The adapted blocks, as `FIRST-LAST`.
        layer: Number of blocks that the loss runs.
        whole: Other losses run all blocks; then it is enough that some adapted block is run.
    """
    chosen = range(0) if blocks is None else block_range(blocks)
    runs = f"--layer {layer} runs blocks 0-{layer - 1}"
    if whole and chosen and chosen.start >= layer:
        return f"--blocks must start below the aligned layer: {runs} only, and --blocks is {blocks}"
    if not whole and chosen.stop > layer:
        return f"--blocks must end below the aligned layer: {runs} only, and --blocks is {blocks}"
    return None


class TrainingSettings(Placed, Written):
    """What all training commands share. Defaults are those of the mid-align paper where it states them."""

    model_config = ConfigDict(allow_inf_nan=False)
    panel = Panel.RUN
    is_long: ClassVar[bool] = True

    base: Annotated[str, Reads(MODEL), Role.DEV_CURVE, Panel.MODEL, Role.CLOSED_FORM] = Field(description=BASE)
    resume: Annotated[bool, Role.HANDLING, Role.COMMON, Role.CLOSED_FORM] = Field(
        False, description="continue an interrupted run"
    )
    on_top_of: Annotated[str | None, Reads(ADAPTER), Panel.LORA, Role.CLOSED_FORM] = Field(
        None, description="frozen adapter to train on top of; merge both with --weights 1,1 afterwards"
    )
    start_from: Annotated[str | None, Reads(ADAPTER), Panel.LORA] = Field(
        None,
        description="adapter to start from, with its factors, rank, alpha, targets and head, instead of a fresh LoRA",
    )
    allow_base_mismatch: Annotated[bool, Panel.LORA] = Field(
        False, description="start from an adapter that was trained on another base model"
    )
    rank: Annotated[Positive, Role.COMMON, Flag(alias="--lora-r"), Panel.LORA, Role.CLOSED_FORM] = Field(
        8, description="rank of the LoRA"
    )
    alpha: Annotated[float, Flag(alias="--lora-alpha"), Panel.LORA] = Field(
        16.0, gt=0, description="alpha of the LoRA; its scale is alpha/rank"
    )
    rslora: Annotated[bool, Flag(alias="--use-rslora"), Panel.LORA] = Field(
        False, description="scale by alpha/sqrt(rank) instead (rsLoRA)"
    )
    dora: Annotated[bool, Flag(alias="--use-dora"), Panel.LORA] = Field(
        False, description="learn the length of every row of the weights too (DoRA)"
    )
    init: Annotated[Init, Flag(alias="--init-lora-weights", also=("true",)), Panel.LORA] = Field(
        "kaiming",
        description="first factors of the LoRA: no update (kaiming, gaussian, orthogonal), or a part of the base's "
        "weights (pissa: leading directions; olora: of a QR; both are saved as plain LoRAs of twice the rank)",
    )
    lora_plus: Annotated[float, Panel.OPTIMISER] = Field(
        1.0, gt=0, description="learning rate of B in multiples of that of A (LoRA+; its authors take 16)"
    )
    dropout: Annotated[float, Flag(alias="--lora-dropout"), Panel.LORA] = Field(
        0.1, ge=0, lt=1, description="dropout inside the LoRA"
    )
    targets: Annotated[
        list[str], Field(min_length=1), Flag(alias="--target-modules", metavar="NAME..."), Panel.LORA
    ] = Field(["all-linear"], description="names of the modules to adapt")
    blocks: Annotated[Blocks | None, Panel.LORA] = Field(
        None, description="FIRST-LAST, the blocks to adapt, both included, counted from 0; default all that are run"
    )
    norm_budget: Annotated[float | None, Panel.LORA] = Field(
        None,
        gt=0,
        description="upper bound on the norm of each module's update, relative to its weight (Frobenius norms)",
    )
    learning_rate: Annotated[float, Role.COMMON, Panel.OPTIMISER] = Field(
        5e-4, gt=0, description="peak learning rate of AdamW"
    )
    weight_decay: Annotated[float, Panel.OPTIMISER] = Field(0.0, ge=0, description="weight decay of AdamW")
    schedule: Annotated[Literal["inverse_sqrt", "linear", "cosine", "constant"], Panel.OPTIMISER] = Field(
        "inverse_sqrt", description="how the learning rate falls"
    )
    warmup: Annotated[float, Panel.OPTIMISER] = Field(
        0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises"
    )
    batch_size: Annotated[Positive, Role.DEV_CURVE, Role.COMMON, Panel.OPTIMISER] = Field(
        32, description="rows per step and per accumulation"
    )
    accumulate: Annotated[Positive, Role.DEV_CURVE, Panel.OPTIMISER] = Field(
        1, description="batches per optimizer step"
    )
    epochs: Annotated[float, Role.DEV_CURVE, Role.COMMON, Panel.OPTIMISER] = Field(
        5.0, gt=0, description="passes over the rows"
    )
    steps: Annotated[Positive | None, Role.DEV_CURVE, Panel.OPTIMISER] = Field(
        None, description="optimizer steps, instead of --epochs"
    )
    max_length: Annotated[Positive, Role.DEV_CURVE, Panel.DATA, Role.CLOSED_FORM] = Field(
        256, description="longest text in tokens; longer ones are cut"
    )
    max_grad_norm: Annotated[float, Panel.OPTIMISER] = Field(
        1.0, gt=0, description="gradients are clipped to this norm"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice instead of keeping them: less memory, a third more time"
    )
    compile: bool = Field(
        False, description="compile the blocks (torch.compile): a slow first step, then faster; the last digits differ"
    )
    shard_base: Annotated[bool, Role.SCHEDULING, Panel.PROCESSES] = Field(
        False, description="shard the frozen base model across processes (FSDP)"
    )
    checkpoint_every: Annotated[Positive, Role.SCHEDULING] = Field(
        25, description="optimizer steps between checkpoints"
    )
    evaluate_every: Positive | None = Field(
        None, description="optimizer steps between measurements of the dev loss; default after each epoch"
    )
    patience: Positive | None = Field(
        None, description="stop after this many measurements of the dev loss without a new best, and keep the best"
    )
    keep_looks: bool = Field(
        False,
        description="also write the state of every measurement of the dev loss, to looks/STEP of the output, to choose "
        "among them by other dev files",
    )
    log_with: Annotated[Literal["tensorboard", "wandb", "trackio"] | None, Role.HANDLING] = Field(
        None, description="tracker that receives losses and dev values; tensorboard writes to runs/ next to --out"
    )
    allow_tested: Annotated[bool, Role.SCHEDULING, Panel.DATA, Role.CLOSED_FORM] = Field(
        False, description=ALLOW_TESTED
    )

    @model_validator(mode="after")
    def _check_training(self) -> TrainingSettings:
        self.check_together()
        return self

    def check_together(self) -> None:
        """Refuse options that do not go together in any training.

        Raises:
            ValueError: two of them are set.
        """
        refuse(
            (
                self.norm_budget is not None and self.dora,
                "train.norm-budget-dora: --norm-budget bounds the low-rank update, and --dora changes the weights "
                "beyond it: drop one",
            ),
            (
                bool(self.on_top_of and self.dora),
                "train.on-top-of-dora: --dora scales the weights below it, so it cannot be merged with --on-top-of: "
                "drop one",
            ),
            (
                bool(self.start_from and self.init != "kaiming"),
                f"train.start-from-init: --start-from starts from the factors of an adapter: drop --init {self.init}",
            ),
            (
                self.allow_base_mismatch and not self.start_from,
                "train.base-mismatch: --allow-base-mismatch is about the adapter of --start-from: add that or drop it",
            ),
            (
                self.init == "orthogonal" and bool(self.rank % 2),
                f"train.orthogonal-rank: --init orthogonal needs an even rank, got {self.rank}",
            ),
            (
                self.init == "orthogonal" and self.quantize != "none",
                "train.orthogonal-quantized: --init orthogonal needs plain weights: drop --quantize",
            ),
        )
        if self.init in MOVING and (clash := self._clash_with_moved_weights()):
            raise InvalidValueError(
                f"--init {self.init} takes a part out of the base's weights, so drop --{clash}",
                code="train.init-option",
            )
        measured = {name: getattr(self, name) for name in ("dev", "dev_pairs", "dev_texts") if hasattr(self, name)}
        if not any(measured.values()) and (self.patience or self.evaluate_every or self.keep_looks):
            option = next(iter(measured)).replace("_", "-")
            raise InvalidValueError(
                f"--patience, --evaluate-every and --keep-looks need dev files: add --{option} FILE",
                code="train.no-dev",
            )

    def _clash_with_moved_weights(self) -> str | None:
        """Return the first option that needs the base's weights whole."""
        objective = getattr(self, "objective", "contrastive")
        trains = getattr(self, "fit", "gradient") == "gradient"
        clashes = {
            "quantize": self.quantize != "none",
            "dora": self.dora,
            "shard-base": self.shard_base,
            "norm-budget": self.norm_budget is not None,
            "keeper": getattr(self, "keeper", 0) > 0,
            "standardize": getattr(self, "standardize", "none") != "none",
            "anchor base": getattr(self, "anchor", "pair") == "base",
            f"objective {objective}": trains and objective != "contrastive",
        }
        return next((name for name, is_set in clashes.items() if is_set), None)


class TaskOptions(ReadsRows):
    """The task objective."""

    panel = Panel.DATA

    task: Annotated[str, Role.DEV_CURVE] = Field(description=TASK)
    train: Annotated[Files, Reads(TRAINING, rows="rows")] = Field(description="training files")
    dev: Annotated[list[str], Reads(DEV), Role.DEV_CURVE, Role.COMMON] = Field(
        [], description="dev files; their loss is logged, and chooses with --patience"
    )
    rows: Annotated[Rows | None, Role.DEV_CURVE] = Field(
        None, description="START:STOP[:STEP], the rows of each training file to use"
    )
    template: Annotated[str | None, Role.DEV_CURVE] = Field(
        None, description="prompt template, such as plain or mid-align; saved with the adapter"
    )
    head: Annotated[str, one_of("auto", "none", HEADS), Role.DEV_CURVE, Panel.OBJECTIVE] = Field(
        "auto",
        description="none: the answer is generated; a head, trained whole, gives it: classes (classify, nli, pairs, "
        "ranking), tokens: tags of words (slots, ner-json, pos), span: a part of the text (qa), choices: one of the "
        "choices (choice); auto: the task's head on encoders",
    )
    head_learning_rate: Annotated[float | None, Panel.OPTIMISER] = Field(
        None, gt=0, description="peak learning rate of the head; default as for the LoRA"
    )
    head_layers: Annotated[HeadLayers | None, Role.DEV_CURVE, Panel.OBJECTIVE] = Field(
        None,
        description="hidden states that a head of adaptermix reads: last; K, block K alone; last+K, both; last+search, "
        "a learned mean of all blocks; default: a head of transformers, where it has one",
    )
    head_pooling: Annotated[HeadPooling | None, Role.DEV_CURVE, Panel.OBJECTIVE] = Field(
        None,
        description="tokens of a text that a head of adaptermix reads: mean, first, last; auto: the first token of "
        "encoders, the last one of language models, the mean of stacks",
    )
    aggregate: Annotated[Aggregate, Role.DEV_CURVE, Panel.OBJECTIVE] = Field(
        "aff", description="how --head-layers last+K fuses two states: gated (aff, se), sum, mean or concatenation"
    )
    gate: Annotated[Gate, Role.DEV_CURVE, Panel.OBJECTIVE] = Field(
        "both", description="what the gate of --aggregate aff and se reads: each token, the mean of the text, or both"
    )
    gate_ratio: Annotated[int, Role.DEV_CURVE, Panel.OBJECTIVE] = Field(
        16, ge=1, description="width of the states divided by the width inside the gate"
    )
    head_norm: Annotated[HeadNorm, Role.DEV_CURVE, Panel.OBJECTIVE] = Field(
        "own",
        description="norm of states before they are fused: own, a layer norm without parameters; final, the model's "
        "last norm for the lower state; none",
    )
    group_by_length: bool = Field(False, description="batch rows of similar length together, so that less is padding")

    @model_validator(mode="after")
    def _check_task(self) -> TaskOptions:
        if self.template and self.head not in ("auto", "none"):
            raise InvalidValueError(f"--head {self.head} reads no prompt: drop --template", code="head.no-template")
        self._check_reader()
        return self

    def _check_reader(self) -> None:
        """Refuse settings of a head that would have no effect."""
        layers = self.head_layers or "last"
        fuses = re.fullmatch(r"last\+\d+", layers) is not None
        needs = {
            "head_layers": (self.head != "none", "a head: drop --head none"),
            "head_pooling": (self.head != "none", "a head: drop --head none"),
            "aggregate": (fuses, "--head-layers last+K"),
            "gate": (fuses and self.aggregate in ("aff", "se"), "--head-layers last+K and --aggregate aff or se"),
            "gate_ratio": (fuses and self.aggregate in ("aff", "se"), "--head-layers last+K and --aggregate aff or se"),
            "head_norm": (layers.startswith("last+"), "--head-layers last+K or last+search"),
        }
        for name, (has_effect, needed) in needs.items():
            if self.changed([name]) and not has_effect:
                raise InvalidValueError(f"--{name.replace('_', '-')} needs {needed}", code="head.reader-option")


class TaskSettings(TaskOptions, TrainingSettings):
    """Train a task LoRA."""
