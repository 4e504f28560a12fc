"""`merge --method fuse`: learn weights per layer or module on rows of a task, then merge exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..adapters import AdapterSource, open_adapters
from ..errors import IncompatibleAdapters, PlanError, UsageError
from ..io.files import check_not_input, check_output
from ..io.json_types import JsonObject
from ..merging.attach import Attachment
from ..merging.merge_adapters import merge
from ..merging.on_model import acting
from ..merging.overrides import layer_of
from ..merging.plan import check
from ..merging.report import MergeReport
from ..merging.weights import resolve_weights
from ..methods import Fuse
from ..methods.base import build
from ..models.base import BaseModel, load_base, model_kind, model_origins, note_other_base, require_causal
from ..models.head_forms import Head
from ..options import MergeSettings
from ..options.roles import Role, marked
from ..progress import SILENT, Watcher
from ..provenance.manifest import inherit
from ..tasks import Task, get_task
from ..tasks.data.report import describe
from ..tasks.heads.from_adapters import head_of, template_of
from ..tasks.splits import DEV, TRAINING, refuse_tested
from ..training.early_stopping import RowsLoss
from ..training.sampler import Sampler
from ..training.task import text_of
from .gate_data import NO_ENTROPY, GateData, check_options, lacking_data, read_data

_LOOKS = 10
_DIGITS = 4
"""Decimals of gates, so that they can be typed again."""
_ROWS_AT_ONCE = 16
_LAYER = "layer "


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Learned weights.

    Args:
        values: One gate per adapter, by group: `layer 3`, a module's path, or `all`.
        losses: First and last training loss, and with dev rows the dev loss at the start and of the best step.
        taken: The step whose gates were taken.
    """

    values: Mapping[str, tuple[float, ...]]
    losses: Mapping[str, float]
    taken: int

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean over groups."""
        columns = zip(*self.values.values(), strict=True)
        return tuple(round(sum(column) / len(self.values), _DIGITS) for column in columns)

    def overrides(self) -> list[JsonObject]:
        """Return the gates as overrides of a merge, which together cover all modules."""
        return [{**_modules_of(group), "weights": list(gate)} for group, gate in self.values.items()]

    def document(self) -> JsonObject:
        """Return plain data."""
        values = {group: list(gate) for group, gate in self.values.items()}
        return {"gates": values, "losses": dict(self.losses), "taken_step": self.taken}


def group_of(per: str, module: str) -> str:
    """Return the group of gates that a module belongs to.

    Example:
        >>> [group_of(per, "model.layers.3.mlp.up_proj") for per in ("layer", "module", "adapter")]
        ['layer 3', 'model.layers.3.mlp.up_proj', 'all']
    """
    if per == "adapter":
        return "all"
    number = layer_of(module) if per == "layer" else None
    return module if number is None else f"{_LAYER}{number}"


def _modules_of(group: str) -> JsonObject:
    if group == "all":
        return {}
    if group.startswith(_LAYER):
        number = group.removeprefix(_LAYER)
        return {"layers": f"{number}-{number}"}
    return {"modules": group}


def learn_gates(
    attached: Attachment,
    method: Fuse,
    weights: Sequence[float],
    rows: RowsLoss,
    dev: RowsLoss | None = None,
    *,
    seed: int = 0,
    watch: Watcher = SILENT,
) -> Gates:
    """Learn gates of adapters on a live model.

    Args:
        attached: The adapters on the model.
        method: Options of the training.
        weights: Gates at the start, one per adapter.
        rows: Loss of the training rows.
        dev: Loss of the rows that choose the best step.
        seed: Seed of the order of rows.
        watch: Receives progress.

    Raises:
        PlanError: there are no weights to learn, or the loss is not finite.
    """
    gates = attached.learn(lambda module: group_of(method.per, module), weights)
    if not gates:
        raise PlanError(
            "gates are learned of plain LoRAs on linear layers, and no adapter here is one.", code="gates.no-lora"
        )
    start = torch.tensor(list(weights), dtype=torch.float32)
    optimizer = torch.optim.Adam(gates.values(), lr=method.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, method.steps))
    sampler = Sampler(groups=[rows.taught], batch_size=method.batch, seed=seed)
    best, losses, taken = {group: tuple(map(float, weights)) for group in gates}, {}, 0
    if dev:
        losses["dev_start"] = losses["dev"] = _mean_loss(dev)
    with watch.track("learn gates", method.steps) as advance:
        for step in range(1, method.steps + 1):
            loss = rows(sampler.batch(step - 1)).loss
            now = float(loss.detach())
            if not math.isfinite(now):
                raise PlanError(
                    f"the loss must stay finite, and is {now} at step {step}: lower --set rate=.",
                    code="gates.not-finite",
                )
            drift = torch.stack([(gate - start.to(gate.device)).square().mean() for gate in gates.values()]).mean()
            optimizer.zero_grad()
            torch.autograd.backward([loss + method.decay * drift])
            optimizer.step()
            schedule.step()
            losses.setdefault("first", now)
            losses["last"] = now
            advance(1, f"loss {now:.3f}")
            is_look = step == method.steps or step % max(1, method.steps // _LOOKS) == 0
            if dev and is_look and (dev_loss := _mean_loss(dev)) < losses["dev"]:
                losses["dev"], best, taken = dev_loss, _values(gates), step
    chosen = best if dev or not method.steps else _values(gates)
    return Gates(values=chosen, losses=losses, taken=taken if dev else method.steps)


def _values(gates: Mapping[str, nn.Parameter]) -> dict[str, tuple[float, ...]]:
    return {group: tuple(round(value, _DIGITS) for value in gate.tolist()) for group, gate in gates.items()}


@torch.no_grad()
def _mean_loss(rows: RowsLoss) -> float:
    total, count = torch.zeros(()), 0
    for first in range(0, len(rows.taught), _ROWS_AT_ONCE):
        batch = rows(rows.taught[first : first + _ROWS_AT_ONCE])
        terms = batch.terms or 0
        total, count = total + batch.loss.cpu() * terms, count + terms
    return float(total) / max(1, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A merge whose weights are to be learned, checked but for the model."""

    settings: MergeSettings
    sources: tuple[AdapterSource, ...]
    weights: tuple[float, ...]
    method: Fuse
    task: Task
    data: GateData
    dev: GateData | None
    tested: Sequence[Mapping[str, object]]

    @classmethod
    def read(cls, settings: MergeSettings, watch: Watcher) -> _Prepared:
        method = build(settings.method, {key: value for key, value in settings.options.items() if "@" not in key})
        lacking = [f"--{name}" for name in ("base", "task") if not getattr(settings, name)] + lacking_data(settings)
        if lacking or not isinstance(method, Fuse):
            raise UsageError(
                f"method '{method.title}' learns its weights on rows of a task: pass {' and '.join(lacking)}.",
                code="gates.no-rows",
            )
        check_options(settings)
        if settings.places or any("@" in key for key in settings.options) or settings.fill != "weight":
            raise UsageError(
                f"method '{method.title}' learns what holds at each place: leave places and --fill out.",
                code="gates.places",
            )
        sources = open_adapters(settings.adapters, allow_pickle=settings.allow_pickle)
        check(sources, allow_base_mismatch=settings.allow_base_mismatch)
        for source in sources:
            if kinds := replace(source, saved_headers={}).beyond_linear:
                raise IncompatibleAdapters(
                    f"gates are learned of plain LoRAs on linear layers, and '{source.name}' has {', '.join(kinds)}.",
                    code="gates.not-lora",
                )
        task = get_task(str(settings.task), settings.columns)
        data, dev = read_data(settings, task)
        uses = {TRAINING: data.files, DEV: dev.files if dev else []}
        return cls(
            settings=settings,
            sources=sources,
            weights=resolve_weights([source.name for source in sources], settings.weights),
            method=method,
            task=task,
            data=data,
            dev=dev,
            tested=refuse_tested(uses, allowed=settings.allow_tested, watch=watch),
        )

    def head(self) -> Head | None:
        """Return the head of the adapters; without one the base must generate."""
        rows = [*self.data.labelled, *(self.dev.labelled if self.dev else ())]
        head = head_of(self.task, self.sources, rows, base=str(self.settings.base))
        if head is None:
            if self.settings.objective == "entropy":
                raise PlanError(NO_ENTROPY, code="gates.entropy")
            require_causal(str(self.settings.base), f"without a head for it, task '{self.task.name}'")
        return head

    def notes(self) -> list[str]:
        texts = [(self.task.language(row), text_of(self.task, row)) for row in self.data.rows]
        dev = [text_of(self.task, row) for row in self.dev.rows] if self.dev else []
        return describe(texts, dev).warnings()

    def learn(self, base: BaseModel, watch: Watcher) -> Gates:
        with acting(base, self.sources, saved=self.settings.saved) as attached:
            # Losses are made with the adapters attached: an output layer that an adapter changes is run whole.
            template = template_of(self.task, self.sources, None)
            rows = self.data.loss(base, attached, template, watch)
            dev = self.dev.loss(base, attached, template, watch) if self.dev else None
            seed = self.settings.seed
            return learn_gates(attached, self.method, self.weights, rows, dev, seed=seed, watch=watch)

    def entries(self, gates: Gates, base: BaseModel) -> JsonObject:
        """Return the manifest's entries on the data and on the training."""
        settings = self.settings
        data, dev = ([file.entry() for file in rows.files] if rows else [] for rows in (self.data, self.dev))
        # A full checkpoint has seen the data of its base too.
        models = [origin.path for origin in model_origins(str(settings.base))] if settings.form == "dense" else []
        inherited = inherit(self.sources, models=models, data=data, dev=dev, tested=self.tested)
        languages = dict(inherited["languages"] or {})
        for role, spoken in self.data.languages.items():
            languages[role] = sorted({*languages.get(role, ()), *spoken})
        how: JsonObject = {"task": self.task.name, "objective": settings.objective, "start": list(self.weights)}
        how |= {"seed": settings.seed, "rows": settings.rows}
        fuse = {**how, "base": base.entry(), "learned_on": data, **gates.document()}
        return {**inherited, "languages": languages, "fuse": fuse}


def merge_with_gates(settings: MergeSettings, *, watch: Watcher = SILENT) -> MergeReport:
    """Learn the weights of a merge on rows, then merge; a dry run checks everything but learns nothing.

    Raises:
        AdapterMixError: as `merge`; invalid model or data files.
    """
    if not settings.dry_run:
        check_output(Path(settings.out), overwrite=settings.overwrite)
    check_not_input(Path(settings.out), [*settings.adapters, str(settings.base)])
    prepared = _Prepared.read(settings, watch)
    options = settings.model_dump(exclude={"adapters", "weights", "places", *marked(settings, Role.LEARNING)})
    # The base is for learning; a weighted sum of plain LoRAs needs none.
    options |= {"base": settings.base if settings.form == "dense" else None}
    for note in prepared.notes():
        watch.note(note)
    head = prepared.head()
    if settings.dry_run:
        model_kind(str(settings.base))
        rows, steps = len(prepared.data.rows), prepared.method.steps
        watch.note(f"gates would be learned on {rows} rows in {steps} steps from these weights")
        return merge(settings.adapters, weights=prepared.weights, learned={}, watch=watch, **options)
    base = load_base(str(settings.base), device=settings.device, head=head)
    note_other_base(base, prepared.sources, watch)
    gates = prepared.learn(base, watch)
    losses = ", ".join(f"{name} loss {value:.3f}" for name, value in gates.losses.items())
    watch.note(f"gates of step {gates.taken}: {losses or 'no loss'}")
    return merge(
        settings.adapters,
        weights=gates.mean,
        places=gates.overrides(),
        model_modules=[name for name, _ in base.model.named_modules()],
        learned=prepared.entries(gates, base),
        watch=watch,
        **options,
    )
