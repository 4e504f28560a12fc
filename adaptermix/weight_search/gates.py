"""`merge --method fuse`: weights per place that are learned on rows of a task, then an ordinary exact merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterSource, open_adapters
from ..errors import IncompatibleAdapters, PlanError, UsageError
from ..io.files import check_not_input, check_output
from ..merging.attach import Attachment
from ..merging.merge_adapters import merge
from ..merging.on_model import acting
from ..merging.overrides import layer_of
from ..merging.plan import check
from ..merging.report import MergeReport
from ..merging.request import merge_as_asked
from ..merging.weights import resolve_weights
from ..methods import Fuse, RegMeanPlus
from ..methods.base import MergeMethod, build
from ..models.base import BaseModel, load_base, model_kind, model_origins, note_other_base, require_causal
from ..models.head_forms import Head
from ..options import MergeSettings
from ..options.paths import holds_output
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
from .block_by_block import merge_block_by_block
from .gate_data import NO_ENTROPY, GateData, check_options, lacking_data, read_data

_LOOKS = 10
_DIGITS = 4
"""Of gates: what is learned can be typed again."""
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """What was learned.

    Args:
        values: One gate per adapter, by group: `layer 3`, a module's path, or `all`.
        losses: First and last training loss, and with dev rows the dev loss at the start and of what was taken.
        taken: The step whose gates were taken.
    """

    values: Mapping[str, tuple[float, ...]]
    losses: Mapping[str, float]
    taken: int

    @property
    def mean(self) -> tuple[float, ...]:
        """Return the mean over groups."""
        columns = zip(*self.values.values(), strict=True)
        return tuple(round(sum(column) / len(self.values), _DIGITS) for column in columns)

    def places(self) -> list[dict[str, Any]]:
        """Return them as places of a merge, which cover every module."""
        return [{**_place(group), "weights": list(gate)} for group, gate in self.values.items()]

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        values = {group: list(gate) for group, gate in self.values.items()}
        return {"gates": values, "losses": dict(self.losses), "taken_step": self.taken}


_LAYER = "layer "


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


def _place(group: str) -> dict[str, Any]:
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
        method: How to learn.
        weights: Where gates begin, one per adapter.
        rows: Loss of the rows to learn from.
        dev: Loss of rows that say when gates are best.
        seed: Seed of the order of rows.
        watch: Receives progress.

    Raises:
        PlanError: there is nothing to weigh, or the loss is not finite.
    """
    gates = attached.learn(lambda module: group_of(method.per, module), weights)
    if not gates:
        raise PlanError("gates are learned of plain LoRAs on linear layers, and no adapter here is one.")
    start = torch.tensor(list(weights), dtype=torch.float32)
    optimizer = torch.optim.Adam(gates.values(), lr=method.rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, method.steps))
    sampler = Sampler(groups=[rows.taught], batch_size=method.batch, seed=seed)
    best, losses, taken = {group: tuple(map(float, weights)) for group in gates}, {}, 0
    if dev:
        losses["dev_start"] = losses["dev"] = _mean_loss(dev)
    with watch.track("learn gates", method.steps) as advance:
        for step in range(1, method.steps + 1):
            loss = rows(sampler.batch(step - 1)).loss
            now = float(loss.detach())
            if not math.isfinite(now):
                raise PlanError(f"the loss must stay finite, and is {now} at step {step}: lower --set rate=.")
            drift = torch.stack([(gate - start.to(gate.device)).square().mean() for gate in gates.values()]).mean()
            optimizer.zero_grad()
            torch.autograd.backward([loss + method.decay * drift])
            optimizer.step()
            falling.step()
            losses.setdefault("first", now)
            losses["last"] = now
            advance(1, f"loss {now:.3f}")
            is_look = step == method.steps or step % max(1, method.steps // _LOOKS) == 0
            if dev and is_look and (found := _mean_loss(dev)) < losses["dev"]:
                losses["dev"], best, taken = found, _values(gates), step
    chosen = best if dev or not method.steps else _values(gates)
    return Gates(values=chosen, losses=losses, taken=taken if dev else method.steps)


def _values(gates: Mapping[str, nn.Parameter]) -> dict[str, tuple[float, ...]]:
    return {group: tuple(round(value, _DIGITS) for value in gate.tolist()) for group, gate in gates.items()}


@torch.no_grad()
def _mean_loss(rows: RowsLoss) -> float:
    total, count = torch.zeros(()), 0
    places = rows.taught
    for first in range(0, len(places), _ROWS_AT_ONCE):
        found = rows(places[first : first + _ROWS_AT_ONCE])
        terms = found.terms or 0
        total, count = total + found.loss.cpu() * terms, count + terms
    return float(total) / max(1, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A merge whose weights are to be learned, checked but for the model."""

    sources: tuple[AdapterSource, ...]
    weights: tuple[float, ...]
    method: Fuse
    task: Task
    data: GateData
    dev: GateData | None
    tested: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, settings: MergeSettings, method: MergeMethod, watch: Watcher) -> _Asked:
        lacking = [f"--{name}" for name in ("base", "task") if not getattr(settings, name)] + lacking_data(settings)
        if lacking or not isinstance(method, Fuse):
            raise UsageError(
                f"method '{method.title}' learns its weights on rows of a task: pass {' and '.join(lacking)}."
            )
        check_options(settings)
        if settings.places or any("@" in key for key in settings.options) or settings.fill != "weight":
            raise UsageError(f"method '{method.title}' learns what holds at each place: leave places and --fill out.")
        sources = open_adapters(settings.adapters, allow_pickle=settings.allow_pickle)
        check(sources, allow_base_mismatch=settings.allow_base_mismatch)
        for source in sources:
            if kinds := replace(source, saved_headers={}).beyond_linear:
                raise IncompatibleAdapters(
                    f"gates are learned of plain LoRAs on linear layers, and '{source.name}' has {', '.join(kinds)}."
                )
        task = get_task(str(settings.task))
        data, dev = read_data(settings, task)
        uses = {TRAINING: data.files, DEV: dev.files if dev else []}
        return cls(
            sources=sources,
            weights=resolve_weights([source.name for source in sources], settings.weights),
            method=method,
            task=task,
            data=data,
            dev=dev,
            tested=refuse_tested(uses, allowed=settings.allow_tested, watch=watch),
        )

    def head(self, settings: MergeSettings) -> Head | None:
        """Return the head that the adapters bring; without one the base must generate."""
        head = head_of(self.task, self.sources, [*self.data.labelled, *(self.dev.labelled if self.dev else ())])
        if head is None:
            if settings.objective == "entropy":
                raise PlanError(NO_ENTROPY)
            require_causal(str(settings.base), f"without a head for it, task '{self.task.name}'")
        return head

    def load(self, settings: MergeSettings, watch: Watcher) -> BaseModel:
        """Load the base with the head that the adapters bring."""
        base = load_base(str(settings.base), device=settings.device, head=self.head(settings))
        note_other_base(base, self.sources, watch)
        return base

    def notes(self) -> list[str]:
        """Return what a person should know of the rows."""
        texts = [(self.task.language(row), text_of(self.task, row)) for row in self.data.rows]
        dev = [text_of(self.task, row) for row in self.dev.rows] if self.dev else []
        return describe(texts, dev).warnings()

    def entries(self, gates: Gates, base: BaseModel, settings: MergeSettings) -> dict[str, Any]:
        """Return what the manifest says of what was learned, how, and on what."""
        data, dev = ([file.entry() for file in found.files] if found else [] for found in (self.data, self.dev))
        # a full checkpoint holds what its base has seen
        models = [own.path for own in model_origins(str(settings.base))] if settings.form == "dense" else []
        inherited = inherit(self.sources, models=models, data=data, dev=dev, tested=self.tested)
        languages = dict(inherited["languages"] or {})
        for role, spoken in self.data.languages.items():
            languages[role] = sorted({*languages.get(role, ()), *spoken})
        how: dict[str, Any] = {"task": self.task.name, "objective": settings.objective, "start": list(self.weights)}
        how |= {"seed": settings.seed, "rows": settings.rows}
        fuse = {**how, "base": base.entry(), "learned_on": data, **gates.document()}
        return {**inherited, "languages": languages, "fuse": fuse}


@holds_output
def merge_learned(settings: MergeSettings, *, watch: Watcher = SILENT) -> Any:
    """Merge as the settings ask for it; a method that learns its weights learns them first.

    Raises:
        AdapterMixError: as `merge`; the model or a data file does not do.
    """
    method = build(settings.method, {key: value for key, value in settings.options.items() if "@" not in key})
    if not method.is_learned:
        given = settings.changed(sorted(marked(settings, Role.LEARNING)))
        if given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} is for methods that learn their weights (fuse), and "
                f"method '{method.title}' is none. Leave it out."
            )
        return merge_as_asked(settings, watch=watch)
    if isinstance(method, RegMeanPlus):
        return merge_block_by_block(settings, watch=watch)
    return _merge_with_gates(settings, method, watch)


def _merge_with_gates(settings: MergeSettings, method: MergeMethod, watch: Watcher) -> MergeReport:
    if not settings.dry_run:
        check_output(Path(settings.out), overwrite=settings.overwrite)
    check_not_input(Path(settings.out), [*settings.adapters, str(settings.base)])
    asked = _Asked.read(settings, method, watch)
    given = settings.model_dump(exclude={"adapters", "weights", "places", *marked(settings, Role.LEARNING)})
    # the base is for learning; a weighted sum of plain LoRAs needs none
    given |= {"base": settings.base if settings.form == "dense" else None}
    for note in asked.notes():
        watch.note(note)
    if settings.dry_run:
        asked.head(settings)
        model_kind(str(settings.base))
        watch.note(
            f"gates would be learned on {len(asked.data.rows)} rows in {asked.method.steps} steps from these weights"
        )
        return merge(settings.adapters, weights=asked.weights, learned={}, watch=watch, **given)
    base = asked.load(settings, watch)
    with acting(base, asked.sources, saved=settings.saved) as attached:
        # within: an output layer that an adapter acts on is run whole
        template = template_of(asked.task, asked.sources, None)
        rows = asked.data.loss(base, attached, template, watch)
        dev = asked.dev.loss(base, attached, template, watch) if asked.dev else None
        gates = learn_gates(attached, asked.method, asked.weights, rows, dev, seed=settings.seed, watch=watch)
    told = (
        "nothing was learned"
        if not gates.losses
        else ", ".join(f"{name} loss {value:.3f}" for name, value in gates.losses.items())
    )
    watch.note(f"gates of step {gates.taken}: {told}")
    return merge(
        settings.adapters,
        weights=gates.mean,
        places=gates.places(),
        model_modules=[name for name, _ in base.model.named_modules()],
        learned=asked.entries(gates, base, settings),
        watch=watch,
        **given,
    )
