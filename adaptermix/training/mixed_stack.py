"""Stacks that generate: the projection alone learns to let the model on top answer the rows of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PlanError
from ..io.json_types import JsonObject
from ..models.base import BaseModel, model_kind
from ..models.devices import pick_dtype
from ..models.encoders import embedding_width_of, width_of
from ..models.eval_mode import train_loras_only
from ..models.mixed_rows import MixedEmbeddings, mount_mixed
from ..models.pretrained import load_config
from ..models.stack import StackForm, embedding_of, stack_folder
from ..models.stack_parts import encoder_config, load_encoder
from ..options import StackSettings
from ..provenance import manifest
from ..tasks.data.prompt_ids import PromptIds
from .lora import checkpoint_activations
from .sharding import load_for
from .stack_folder import part_of, refuse_stack_on_top, write_stack
from .stack_start import FITTED, StackStates, start_projection
from .task import RowsObjective, TaskData, TaskLoss
from .trainer import Together


class MixedStackObjective(RowsObjective[StackSettings]):
    """Next-token prediction of answers after prompts that the encoder reads, as in LangBridge and MindMerger.

    The encoder and the model on top are frozen, and there is no LoRA. A stack in `base` is continued, also with another
    mode: MindMerger's mapping stage is "replace" on translations, its augmentation stage "augment" on a task.

    Reference: Yoon et al., LangBridge, ACL 2024, arXiv 2401.10695, section 3; Huang et al., MindMerger, NeurIPS 2024,
    arXiv 2405.17386, section 3.2.
    """

    form: StackForm

    def read(self) -> None:
        settings = self.run.settings
        folder = stack_folder(settings.base)
        if settings.encoder:
            refuse_stack_on_top(settings.base)
            if model_kind(settings.base) != "causal":
                raise PlanError(
                    f"--mode {settings.mode} needs a language model in --base, and {settings.base!r} is an encoder: "
                    "use --mode states, or another model.",
                    code="stack.mode",
                )
        elif folder is None or not StackForm.read(folder).generates:
            raise PlanError(
                f"--mode {settings.mode} needs --encoder for a new stack, or in --base a stack that was made with "
                f"--mode replace or augment, got {settings.base!r}.",
                code="stack.no-stack",
            )
        self._before = [manifest.origin_of(folder)] if folder else []
        self.data = TaskData.read(settings, watch=self.run.watch)
        self.report = self.data.report

    def parameters(self) -> int:
        settings = self.run.settings
        folder = stack_folder(settings.base)
        form = StackForm.read(folder) if folder else None
        below = encoder_config(form.encoder.id if form else str(settings.encoder))
        top = load_config(form.base.id if form else settings.base)
        return (width_of(below) + 2) * embedding_width_of(top)  # the weight, the bias and the border

    def inputs(self) -> JsonObject:
        return {"encoder": self.form.encoder.fingerprint}

    def load(self) -> BaseModel:
        settings = self.run.settings
        base = load_for(settings, self.run.processes)
        augments = settings.mode == "augment"
        if base.stack and base.mixed:
            self.form = replace(base.stack, mode=settings.mode)
            return replace(base, stack=self.form, mixed=replace(base.mixed, augments=augments))
        dtype = pick_dtype(settings.dtype, base.device)
        encoder, tokenizer = load_encoder(str(settings.encoder), device=base.device, dtype=dtype)
        mixed = mount_mixed(base.model, encoder, tokenizer, augments=augments)
        self.form = StackForm(
            encoder=part_of(str(settings.encoder)),
            base=part_of(settings.base),
            mode=settings.mode,
            offset=mixed.offset,
            lora=False,
        )
        return replace(base, stack=self.form, mixed=mixed)

    def prepare(self) -> None:
        self._start()
        self.encode()

    def _start(self) -> None:
        """Start the projection and the border of a new stack from the prompts; those of another stack do not change."""
        base, settings, data = self.run.base, self.run.settings, self.data
        assert base.mixed  # noqa: S101  (for the type checker)
        below = base.mixed.reader.tokenizer
        ids = PromptIds(tokenizer=base.tokenizer, mixed=replace(base.mixed, augments=True))
        some, task = data.train[:FITTED], data.task
        prompts = (ids.encode(data.template, task.fields(row), task.language(row)) for row in some)
        cut = (ids.shortened(prompt, settings.max_length) for prompt in prompts)
        student, teacher = zip(*map(base.mixed.split, cut), strict=True)
        states = StackStates(replace(base, tokenizer=below), base.tokenizer, "mean")
        way = settings.projection_init if settings.encoder else "keep"
        means = start_projection(states, list(student), list(teacher), way=way, watch=self.run.watch)
        self.embedding = embedding_of(base.model)
        if settings.encoder and isinstance(self.embedding, MixedEmbeddings):
            with torch.no_grad():
                self.embedding.border.weight.copy_(means.mean(0, keepdim=True))

    def inject(self) -> list[str]:
        model = self.run.base.model
        model.requires_grad_(False)
        for parameter in self.embedding.stored().values():
            parameter.requires_grad_(True)
        checkpoint_activations(model, self.run.settings)
        return []

    def loss(self, together: Together | None = None) -> TaskLoss:
        train_loras_only(self.run.base.model)
        return super().loss(together)

    def entries(self) -> Mapping[str, object]:
        entries = self.data.manifest(self.run.base, self.train_rows)
        stack = {"artifact": "stack", "stack": self.form.document()}
        return {**entries, **stack, **manifest.files_of(self._before, entries)}

    def write(self, folder: Path, factors: dict[str, Tensor]) -> None:
        live = {id(parameter): name for name, parameter in self.run.base.model.named_parameters()}
        tensors = {name: factors[live[id(parameter)]].cpu() for name, parameter in self.embedding.stored().items()}
        weight, bias = self.embedding.folded(tensors["weight"], tensors["bias"])
        projection = tensors | {"weight": weight, "bias": bias}
        write_stack(folder, self.run.base, projection)
