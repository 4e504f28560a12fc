"""Options of training stacks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import TASK, ReadsRows, refuse
from .fields import Positive, Rows
from .roles import ADAPTER, DEV, MODEL, TRAINING, Flag, Panel, Reads, Role
from .training import TrainingSettings

_OF_STATES = ("pooling", "attention", "span")
_OF_TEXTS = (*_OF_STATES, "projection_init", "projection_rate")


class StackSettings(ReadsRows, TrainingSettings):
    """Put a multilingual encoder under a language model or an encoder, or teach such a stack a task.

    With `encoder` and `texts` the stack is made (stage 1). With `teacher`, `task` and `train` the base is a stack, and
    learns the states of its teacher, an adapter that was trained on the model on top alone (stage 2). Defaults are
    those of Schmidt et al., arXiv 2406.12739, appendix A. With a `mode` that generates, `task` and `train` have the
    rows whose answers the model on top learns to generate from the states of the encoder.
    """

    panel = Panel.OBJECTIVE

    encoder: Annotated[str | None, Reads(MODEL), Role.COMMON, Panel.MODEL] = Field(
        None, description="multilingual encoder to put under the base model; stage 1"
    )
    mode: Annotated[Literal["states", "replace", "augment"], Role.DEV_CURVE] = Field(
        "states",
        description="states: learn states, for a task head; to generate answers, the model reads the encoder's states "
        "of the prompt (replace), or these and then the prompt itself (augment)",
    )
    texts: Annotated[list[str], Reads(TRAINING, "texts"), Role.COMMON, Panel.DATA] = Field(
        [], description="plain texts in a language of both models, one per line; stage 1"
    )
    dev_texts: Annotated[list[str], Reads(DEV, "texts"), Role.DEV_CURVE, Role.COMMON, Panel.DATA] = Field(
        [], description="texts on which the unexplained variance is logged, by which --patience chooses; stage 1"
    )
    teacher: Annotated[str | None, Reads(ADAPTER), Role.COMMON] = Field(
        None, description="task adapter of the model on top, trained with --head-pooling mean; stage 2"
    )
    task: Annotated[str | None, Role.DEV_CURVE, Role.COMMON, Panel.DATA] = Field(
        None, description=f"{TASK}; stage 2, and --mode replace and augment"
    )
    train: Annotated[list[str], Reads(TRAINING, rows="rows"), Role.COMMON, Panel.DATA] = Field(
        [],
        description="training files of the task; stage 2 (without their labels), and --mode replace and augment",
    )
    dev: Annotated[list[str], Reads(DEV), Role.DEV_CURVE, Panel.DATA] = Field(
        [], description="dev files of the task; stage 2, and --mode replace and augment"
    )
    rows: Annotated[Rows | None, Role.DEV_CURVE, Panel.DATA] = Field(
        None, description="START:STOP[:STEP], the rows of each training file to use"
    )
    template: Annotated[str | None, Role.DEV_CURVE, Panel.DATA] = Field(
        None, description="prompt template, such as plain; --mode replace and augment"
    )
    pooling: Annotated[Literal["mean", "first", "last"], Role.DEV_CURVE] = Field(
        "mean", description="states of a text that are compared: the mean over tokens, the first or the last one"
    )
    attention: Literal["causal", "both"] = Field(
        "causal", description="both: tokens of a language model also attend to later tokens"
    )
    span: Annotated[Literal["characters", "tokens"], Panel.DATA] = Field(
        "characters",
        description="long texts are cut to the same characters for both models, or each to its own --max-length "
        "tokens, as in the release",
    )
    projection_init: Literal["least-squares", "random"] = Field(
        "least-squares",
        description="first projection: from mean states of the encoder to mean embeddings of the base model by least "
        "squares, or at random; both act on z-scores of the encoder's states",
    )
    projection_rate: Annotated[float | None, Panel.OPTIMISER] = Field(
        None, gt=0, description="peak learning rate of the projection; default as for the LoRA"
    )
    rank: Annotated[Positive, Role.COMMON, Flag(alias="--lora-r"), Panel.LORA] = Field(
        16, description="rank of the LoRA"
    )
    alpha: Annotated[float, Flag(alias="--lora-alpha"), Panel.LORA] = Field(
        32.0, gt=0, description="alpha of the LoRA; its scale is alpha/rank"
    )
    dropout: Annotated[float, Flag(alias="--lora-dropout"), Panel.LORA] = Field(
        0.05, ge=0, lt=1, description="dropout inside the LoRA"
    )
    learning_rate: Annotated[float, Role.COMMON, Panel.OPTIMISER] = Field(
        2e-4, gt=0, description="peak learning rate of AdamW"
    )
    epochs: Annotated[float, Role.DEV_CURVE, Panel.OPTIMISER] = Field(
        1.0, gt=0, description="passes over the texts or rows"
    )
    schedule: Annotated[Literal["inverse_sqrt", "linear", "cosine", "constant"], Panel.OPTIMISER] = Field(
        "linear", description="how the learning rate falls"
    )
    warmup: Annotated[float, Panel.OPTIMISER] = Field(
        0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises"
    )

    @property
    def head_learning_rate(self) -> float | None:
        """Learning rate of the modules that are trained whole: the projection."""
        return self.projection_rate

    @model_validator(mode="after")
    def _check_stage(self) -> StackSettings:
        refuse(
            (self.shard_base, "stack.shard: --shard-base does not support the encoder of a stack: drop it"),
            (
                bool(self.on_top_of),
                "stack.on-top-of: a stack cannot be trained on top of another adapter: drop --on-top-of",
            ),
        )
        if self.mode == "states":
            self._check_states()
        else:
            self._check_generating()
        return self

    def _check_states(self) -> None:
        """Refuse options that do not go together in the two stages of self-distillation."""
        first, second = self.encoder is not None, self.teacher is not None
        odd = self.changed(_OF_TEXTS)
        refuse(
            (
                first == second,
                "stack.stage: give --encoder and --texts to make a stack, or --teacher, --task and --train to teach a "
                "stack a task",
            ),
            (first and not self.texts, "stack.texts: --encoder needs texts to learn from: add --texts FILE"),
            (
                first and bool(self.task or self.train or self.dev),
                "stack.stage-1: --task, --train and --dev are for stage 2: drop them, or give --teacher",
            ),
            (second and not (self.task and self.train), "stack.task: --teacher needs --task and --train"),
            (
                second and bool(self.texts or self.dev_texts or odd),
                f"stack.stage-2: --{(odd or ['texts'])[0].replace('_', '-')} is for stage 1: drop it",
            ),
            (
                bool(self.template),
                "stack.template: --template is for --mode replace and augment: drop it",
            ),
            (
                first and bool(self.start_from or self.init in ("pissa", "olora")),
                "stack.start: a new stack starts from its two models: drop --start-from and --init",
            ),
            (
                first and self.dora,
                "stack.dora: the LoRA of a stack is added next to quantised weights too: drop --dora",
            ),
        )

    def _check_generating(self) -> None:
        """Refuse options that do not go together where the projection alone learns to generate answers."""
        lora = [name for name, field in type(self).model_fields.items() if Panel.LORA in field.metadata]
        unused = self.changed([*lora, "norm_budget", "lora_plus", "projection_rate"])
        odd = self.changed(_OF_STATES)
        refuse(
            (
                bool(self.texts or self.dev_texts or self.teacher) or not (self.task and self.train),
                f"stack.rows: --mode {self.mode} learns from the rows of a task: give --task and --train, and drop "
                "--texts, --dev-texts and --teacher",
            ),
            (
                bool(unused),
                f"stack.no-lora: --mode {self.mode} trains the projection alone, at --learning-rate: drop "
                f"--{unused[0].replace('_', '-') if unused else ''}",
            ),
            (
                bool(odd),
                f"stack.of-states: --{odd[0].replace('_', '-') if odd else ''} is for --mode states: drop it",
            ),
            (
                not self.encoder and self.projection_init != "least-squares",
                "stack.continued: a stack in --base starts from its own projection: drop --projection-init",
            ),
        )
