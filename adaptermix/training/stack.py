"""Stage 1 of a stack: a multilingual encoder under a model, distilled from that model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters.keys import PREFIX
from ..errors import DataError, PlanError
from ..io.json_types import JsonObject
from ..models.base import BaseModel, backbone
from ..models.both_sides import see_both_sides
from ..models.devices import pick_dtype
from ..models.encoders import embedding_width_of, width_of
from ..models.eval_mode import evaluating, train_loras_only
from ..models.pretrained import load_config
from ..models.stack import StackForm, mount
from ..models.stack_parts import encoder_config, load_encoder
from ..options import StackSettings
from ..progress import SILENT, Watcher
from ..tasks.data.report import describe
from ..tasks.data.texts import texts_of
from ..tasks.splits import DEV, TRAINING, refuse_tested
from .lora import extract, state_of
from .losses.stacking import state_loss, unexplained
from .mixed_stack import MixedStackObjective
from .parallel import Processes
from .report import TrainReport
from .runner import Objective, run_training
from .sharding import load_for
from .stack_folder import part_of, refuse_stack_on_top, write_stack
from .stack_start import StackStates, all_vectors, start_projection
from .stack_task import StackTaskObjective
from .stack_texts import TwoReadings
from .task import TaskLoss
from .trainer import BatchLoss, Together

if TYPE_CHECKING:
    pass


class TextRows:
    """Loss of texts by their numbers: distance of the stack's states from those of the model on top.

    Args:
        states: Computes the states.
        read: The texts.
    """

    def __init__(self, states: StackStates, read: TwoReadings) -> None:
        self._states, self._read = states, read
        self.lengths = list(map(len, read.student))
        self.taught = range(len(self.lengths))

    def terms(self, rows: Sequence[int]) -> int:
        return len(rows)

    def __call__(self, rows: Sequence[int]) -> BatchLoss:
        student, teacher = ([side[row] for row in rows] for side in (self._read.student, self._read.teacher))
        targets = self._states.teacher(teacher)
        loss = state_loss(self._states.student(student), targets)
        return BatchLoss(loss, sum(map(len, student)), terms=len(rows))


class DevStates:
    """Measures how much of the variance of the teacher's states on dev texts the stack leaves unexplained.

    Args:
        states: Computes the states.
        read: The dev texts.
        processes: The processes of the run; each measures all texts.
    """

    def __init__(self, states: StackStates, read: TwoReadings, processes: Processes) -> None:
        self._states, self._read, self._processes = states, read, processes
        with processes.autocast():
            self._targets = all_vectors(states.teacher, read.teacher)

    def __call__(self) -> dict[str, float]:
        with torch.no_grad(), evaluating(self._states._base.model), self._processes.autocast():
            states = all_vectors(self._states.student, self._read.student)
        loss, share = float(state_loss(states, self._targets)), unexplained(states, self._targets)
        return {"dev_loss": loss, "dev_unexplained": share}


class StackObjective(Objective[StackSettings]):
    """Stage 1: train the stack's state of a text towards the state that the model on top has of it."""

    command = "train-stack"
    unit = "texts"

    def read(self) -> None:
        settings = self.run.settings
        refuse_stack_on_top(settings.base)
        self.texts, files = texts_of(settings.texts, rows=settings.rows)
        self.dev_texts, dev_files = texts_of(settings.dev_texts) if settings.dev_texts else ([], [])
        if len(self.texts) < 2 or (settings.dev_texts and len(self.dev_texts) < 2):
            raise DataError(
                "--texts and --dev-texts need at least two different texts each.", code="stack.too-few-texts"
            )
        allowed = settings.allow_tested
        tested = refuse_tested({TRAINING: files, DEV: dev_files}, allowed=allowed, watch=self.run.watch)
        languages = sorted({file.languages[0] for file in files if file.languages})
        if len(languages) > 1:
            raise DataError(
                f"--texts must be in one language, found {' and '.join(languages)}. Give files of one of them.",
                code="stack.languages",
            )
        self.language = next(iter(languages), "en")
        self.report = describe([(self.language, text) for text in self.texts], self.dev_texts)
        self._files: dict[str, object] = {
            "data": [file.entry() for file in files],
            "dev": [file.entry() for file in dev_files] or None,
            "tested": tested or None,
            "rows": self.report.document(),
        }

    def check(self) -> None:
        settings = self.run.settings
        below, top = encoder_config(str(settings.encoder)), load_config(settings.base)
        self._projection_size = (width_of(below) + 1) * embedding_width_of(top)

    def parameters(self) -> int:
        return super().parameters() + self._projection_size

    def inputs(self) -> JsonObject:
        return {"encoder": self.form.encoder.fingerprint}

    def notes(self) -> list[str]:
        return self.report.warnings("texts")

    def load(self) -> BaseModel:
        settings = self.run.settings
        base = load_for(settings, self.run.processes)
        body = backbone(base)
        if settings.attention == "both" and base.kind != "causal":
            raise PlanError(
                f"--attention both is for language models, and {settings.base!r} is an encoder: drop it.",
                code="stack.attention",
            )
        encoder, tokenizer = load_encoder(
            str(settings.encoder), device=base.device, dtype=pick_dtype(settings.dtype, base.device)
        )
        self.own_tokenizer = base.tokenizer
        mount(body, encoder, tokenizer)
        if settings.attention == "both":
            see_both_sides(body)
        self.form = StackForm(
            encoder=part_of(str(settings.encoder)),
            base=part_of(settings.base),
            attention=settings.attention,
            pooling=settings.pooling,
        )
        return replace(base, kind="encoder", model=body, tokenizer=tokenizer, tags={}, stack=self.form)

    def prepare(self) -> None:
        base, settings = self.run.base, self.run.settings
        self.states = StackStates(base, self.own_tokenizer, settings.pooling)
        tokenizers = (base.tokenizer, self.own_tokenizer)
        most = min(settings.max_length, *(int(each.model_max_length) for each in tokenizers))
        read = partial(TwoReadings, tokenizers=tokenizers, language=self.language, most=most, span=settings.span)
        self.texts_read = read(self.texts)
        if self.texts_read.cut:
            self.run.watch.note(f"{self.texts_read.cut} texts are longer than {most} tokens and lose their ends.")
        self.dev_read = read(self.dev_texts) if self.dev_texts else None
        reading = self.texts_read.student, self.texts_read.teacher
        start_projection(self.states, *reading, way=settings.projection_init, watch=self.run.watch)
        path = next(name for name, module in base.model.named_modules() if module is self.states.embedding)
        self.run.base = replace(base, head_modules=(f"{path}.projection",))

    def rows(self) -> int:
        return len(self.texts)

    def dev_values(self) -> Callable[[], dict[str, float]] | None:
        return DevStates(self.states, self.dev_read, self.run.processes) if self.dev_read else None

    def entries(self) -> dict[str, Any]:
        return self._files | {"artifact": "stack", "stack": self.form.document()}

    def loss(self, together: Together | None = None) -> TaskLoss:
        train_loras_only(self.run.base.model)
        rows = TextRows(self.states, self.texts_read)
        return TaskLoss(rows, self.run.settings, self.run.processes, together=together)

    def write(self, folder: Path, factors: dict[str, Tensor]) -> None:
        run = self.run
        trained = extract(factors, run.scales, run.taken)
        (path,) = run.base.head_modules
        saved = {name.removeprefix(f"{PREFIX}{path}."): value for name, value in trained.saved.items()}
        weight, bias = self.states.embedding.folded(saved["weight"], saved["bias"])
        projection = {"weight": weight, "bias": bias}
        base = replace(run.base, head_modules=())
        state = state_of(base, replace(trained, saved={}), run.names, None)
        write_stack(folder, base, projection, state)


class _StageTwo(StackTaskObjective):
    command = StackObjective.command


class _Generating(MixedStackObjective):
    command = StackObjective.command


def train_stack(settings: StackSettings, *, watch: Watcher = SILENT, callbacks: Sequence[Any] = ()) -> TrainReport:
    """Make a stack of a multilingual encoder under a model, or teach a stack a task.

    With `encoder` and `texts`, stage 1: the states of the stack are trained towards those that the model on top has of
    the same text (self-distillation). The output is a model folder for `base` of every command. With `teacher`, stage
    2: the stack is trained towards the states of a task adapter of the model on top, whose head the output has. With a
    `mode` that generates, the projection alone learns to let the model on top answer the rows of a task.

    Args:
        settings: The run's settings.
        watch: Receives progress.
        callbacks: Objects with methods of transformers' `TrainerCallback`; see `training.callbacks.Callbacks`.

    Raises:
        AdapterMixError: invalid model, data file, setting or output.

    Reference: Schmidt et al., Findings of EMNLP 2024, arXiv 2406.12739, section 3.
    """
    kinds: dict[bool, type[Objective[StackSettings]]] = {True: StackObjective, False: _StageTwo}
    objective = kinds[settings.encoder is not None] if settings.mode == "states" else _Generating
    return run_training(objective, settings, watch=watch, callbacks=callbacks)
