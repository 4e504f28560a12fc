"""Settings of the training commands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from . import checks
from .alignment import contrast_if_asked, rank_of_fit, sound_align, sound_fit
from .base import ALLOW_TESTED, TASK, Files, Layer, Placed, Positive, Settings, Standardize, Written
from .roles import DEV, TRAINING, Reads

Objective = Literal["contrastive", "distil", "both"]


class TrainingSettings(Placed, Written):
    """What all training commands share. Defaults are those of the mid-align paper where it states them."""

    model_config = ConfigDict(allow_inf_nan=False)

    base: str = Field(description="base model: folder or Hub id, with @REVISION if wanted")
    resume: bool = Field(False, description="go on with an interrupted run")
    on_top_of: str | None = Field(
        None, description="frozen adapter to train on top of; merge both with --weights 1,1 afterwards"
    )
    start_from: str | None = Field(
        None,
        description="adapter to begin from, with its factors, rank, alpha, targets and head, in place of a fresh LoRA",
    )
    allow_base_mismatch: bool = Field(False, description="begin from an adapter that was trained on another base model")
    rank: Positive = Field(8, description="rank of the LoRA")
    alpha: float = Field(16.0, gt=0, description="alpha of the LoRA; its scale is alpha/rank")
    rslora: bool = Field(False, description="scale by alpha/sqrt(rank) instead (rsLoRA)")
    dora: bool = Field(False, description="learn the length of every row of the weights too (DoRA)")
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        "kaiming",
        description="how the LoRA begins: with no update (kaiming, gaussian, orthogonal), or with a part of the base's "
        "weights (pissa: leading directions; olora: of a QR; both are saved as plain LoRAs of twice the rank)",
    )
    lora_plus: float = Field(
        1.0, gt=0, description="learning rate of B in multiples of that of A (LoRA+; its authors take 16)"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout inside the LoRA")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ["all-linear"], description="names of the modules to adapt"
    )
    blocks: checks.Blocks | None = Field(
        None, description="FIRST-LAST, the blocks to adapt, both included, counted from 0; default all that are run"
    )
    norm_budget: float | None = Field(
        None, gt=0, description="most that each module's update may weigh, as a share of its weight's Frobenius norm"
    )
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    schedule: Literal["inverse_sqrt", "linear", "cosine", "constant"] = Field(
        "inverse_sqrt", description="how the learning rate falls"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    batch_size: Positive = Field(32, description="rows per step and per accumulation")
    accumulate: Positive = Field(1, description="batches per optimizer step")
    epochs: float = Field(5.0, gt=0, description="passes over the rows")
    steps: Positive | None = Field(None, description="optimizer steps; takes the place of --epochs")
    max_length: Positive = Field(256, description="longest text in tokens; longer ones are cut")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice instead of keeping them: less memory, a third more time"
    )
    compile: bool = Field(
        False, description="compile the blocks (torch.compile): a slow first step, then faster; the last digits differ"
    )
    shard_base: bool = Field(
        False,
        description="of several processes let each hold a share of the frozen base model's blocks, not all (FSDP)",
    )
    checkpoint_every: Positive = Field(25, description="optimizer steps between checkpoints")
    evaluate_every: Positive | None = Field(
        None, description="optimizer steps between looks at the dev loss; default after each epoch"
    )
    patience: Positive | None = Field(
        None, description="stop after so many looks at the dev loss without a new best, and keep the best"
    )
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = Field(
        None, description="tracker that receives losses and dev values; tensorboard writes to runs/ next to --out"
    )
    allow_tested: bool = Field(False, description=ALLOW_TESTED)

    _sound_training = model_validator(mode="after")(checks.sound_training)


class AlignOptions(Settings):
    """The alignment objective."""

    pairs: Annotated[Files, Reads(TRAINING, "pairs", "rows")] = Field(
        description="parallel pair files, such as de-en.tsv"
    )
    dev_pairs: Annotated[list[str], Reads(DEV, "pairs")] = Field(
        [], description="pair files whose loss is logged, and chooses with --patience"
    )
    layer: Layer = Field("middle", description="number of blocks to run: middle (n/2), last (n) or 1 to n")
    objective: Objective = Field(
        "contrastive",
        description="contrastive: pull translations together and push other pairs apart (published); distil: move each "
        "sentence's states to those that the frozen base has of its translation; both: the sum",
    )
    temperature: float = Field(0.1, gt=0, description="temperature of the contrastive loss")
    symmetric: bool = Field(False, description="average both directions; published: source to target only")
    anchor: Literal["pair", "base"] = Field(
        "pair", description="targets' states: of the model in training, or of the frozen base (a fixed teacher)"
    )
    stop_gradient: bool = Field(False, description="train the source side only: no gradient through the targets")
    pooling: Literal["mean", "bos"] = Field("mean", description="sentence vector: mean over tokens, or the first token")
    mask_duplicates: bool = Field(False, description="do not count equal target sentences as negatives")
    exclude_bos: bool = Field(False, description="leave the first special token out of the mean")
    standardize: Standardize = Field(
        "none",
        description="contrast z-scores of means of unit states, over all sentences of the frozen base or those of each "
        "language: for models whose long tokens and dimensions drown the others (all cosines near 1)",
    )
    gather_negatives: bool = Field(
        True,
        description="where several processes share a batch: contrast a pair with those of all of them, as one process "
        "would; else with its own process's share",
    )
    balance: Literal["languages", "rows"] = Field(
        "languages", description="draw every language pair equally often, or every row"
    )
    keeper: float = Field(
        0.0, ge=0, description="weight of a term that keeps the targets' states (English) as the frozen base has them"
    )

    _sound_align = model_validator(mode="after")(sound_align)


class TaskOptions(Settings):
    """The task objective."""

    task: str = Field(description=TASK)
    train: Annotated[Files, Reads(TRAINING, rows="rows")] = Field(description="training files")
    dev: Annotated[list[str], Reads(DEV)] = Field(
        [], description="dev files; their loss is logged, and chooses with --patience"
    )
    rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each training file to use")
    template: str | None = Field(
        None, description="prompt template, such as plain or mid-align; saved with the adapter"
    )
    head: Literal["auto", "none", "classes", "tokens", "span"] = Field(
        "auto",
        description="none: the answer is generated; a head, trained whole, gives it: classes (classify, nli), tokens: "
        "tags of words (slots, ner-json), span: a part of the text (qa); auto: the task's head on encoders",
    )
    head_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of the head; default that of the LoRA"
    )
    group_by_length: bool = Field(False, description="batch rows of like length together, so that less is padding")

    _sound_task = model_validator(mode="after")(checks.sound_task)


class AlignSettings(AlignOptions, TrainingSettings):
    """Train a stand-alone alignment LoRA at a middle layer, or compute it in closed form."""

    objective: Objective = Field(
        "distil",
        description="distil: move each sentence's states to those that the frozen base has of its translation, which a "
        "task adapter was trained on; contrastive: pull translations together and push other pairs apart (published; "
        "the default where one of its options, such as --temperature, is given); both: the sum",
    )
    fit: Literal["gradient", "least-squares", "mean-shift"] = Field(
        "gradient",
        description="gradient: train the LoRA; least-squares: compute it without training, for one layer, so that the "
        "frozen base's states of sources move to those of their translations (default rank 64); mean-shift: the same "
        "constant move for all states, their mean distance",
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(
        32,
        description="pairs per batch; for the contrastive objective the others of a batch are the negatives, also with "
        "--accumulate",
    )
    rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each file to use")

    _objective = model_validator(mode="before")(contrast_if_asked)
    _rank = model_validator(mode="before")(rank_of_fit)
    _sound_fit = model_validator(mode="after")(sound_fit)


class TaskSettings(TaskOptions, TrainingSettings):
    """Train a task LoRA."""


class JointSettings(TaskOptions, AlignOptions, TrainingSettings):
    """Train one LoRA for a task and for alignment, the two taking turns."""

    batch_size: Annotated[int, Field(ge=2)] = Field(32, description="rows, and pairs, per batch")
    pairs: Annotated[Files, Reads(TRAINING, "pairs", "pair_rows")] = Field(
        description="parallel pair files, such as de-en.tsv"
    )
    pair_rows: checks.Rows | None = Field(None, description="START:STOP[:STEP], the rows of each pair file to use")
    alternate: Literal["step", "batch", "sum"] = Field(
        "step",
        description="whose turn it is: another objective every optimizer step (paper), every batch (release), or "
        "both summed",
    )
    align_weight: float = Field(1.0, ge=0, description="weight of the alignment loss")
    discard: bool = Field(
        False, description="pass over the rows of the objective whose turn it is not, as the release does"
    )
    select: Literal["task", "align", "sum"] = Field(
        "task", description="dev loss that --patience looks at; the release takes the sum"
    )

    _sound_joint = model_validator(mode="after")(checks.sound_joint)
