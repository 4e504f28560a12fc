"""Heads of adapters, and the prompt templates that they were trained with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...adapters import AdapterSource
from ...errors import PlanError
from ...models.head_forms import Head, HeadForm, Reader
from ...models.pretrained import load_config
from ...models.stack import STACK
from .. import Task, get_template
from ..data.tables import Row
from . import HEADS


def template_of(task: Task, sources: Sequence[AdapterSource], requested: str | None) -> str:
    """Return the name of the prompt template: the requested one, else an adapter's for this task, else the default.

    Raises:
        PlanError: the task has no template of this name.
    """
    entries = [source.meta.manifest.get("task") for source in sources]
    # A manifest is a file that users edit, so entries of another form are ignored.
    trained = [entry.get("template") for entry in entries if isinstance(entry, Mapping)]
    named = requested or next((name for name in trained if name and isinstance(name, str)), None)
    return get_template(task, named).name


_UNNAMED = re.compile(r"LABEL_\d+")
"""A label as transformers names it if nobody does."""


def head_of(
    task: Task, sources: Sequence[AdapterSource], rows: Sequence[Row], *, names: Sequence[str] = (), base: str = ""
) -> Head | None:
    """Return the head of adapters, None if they have no head.

    Its labels are those of the adapter's manifest; for adapters of other tools the names from the caller, those of the
    base model's configuration (`id2label`), or the task's fixed labels.

    Args:
        task: The task.
        sources: The adapters.
        rows: Its rows.
        names: Names of the outputs of heads whose adapters list none, in their order (`--labels`).
        base: The base model: a folder or Hub id. Its configuration is read only if it is needed.

    Raises:
        PlanError: the head was trained for another task or lacks all labels of the rows, adapters differ in their
            heads, or the labels or the kind of head are not known.
    """
    forms = [(source, form) for source in sources if (form := form_of_head(source))]
    heads = {source.name: _head(task, source, form, names, base) for source, form in forms}
    if not heads:
        if names:
            raise PlanError(
                "--labels names the outputs of an adapter's head, and no adapter here has one: drop it.",
                code="head.no-head-labels",
            )
        return None
    kinds = sorted({head.form.name for head in heads.values()})
    if len(kinds) > 1:
        raise PlanError(
            f"adapters must have heads of one kind to be compared or searched, found {' and '.join(kinds)}.",
            code="head.kinds",
        )
    labels = {head.labels for head in heads.values()}
    if len(labels) > 1:
        raise PlanError(
            f"adapters with heads must have the same labels, found {sorted(map(list, labels))}.", code="head.labels"
        )
    readers = {head.reader for head in heads.values()}
    if len(readers) > 1:
        raise PlanError(
            f"heads must read the same hidden states, and those of {' and '.join(sorted(heads))} differ in task.reader "
            "of their adaptermix.json.",
            code="head.readers",
        )
    name, head = next(iter(heads.items()))
    kind = HEADS[head.form.name]
    needed = kind.labels(task, rows)
    new = sorted(set(needed) - set(head.labels))
    if new and kind.closed and len(new) == len(needed):  # a few new labels are wrong answers, or rows left out
        raise PlanError(
            f"rows must have labels of the head of '{name}' ({', '.join(head.labels)}), found {new[0]!r}. "
            "Give data of the task that it was trained for.",
            code="head.row-labels",
        )
    return head


def form_of_head(source: AdapterSource) -> HeadForm | None:
    """Return the kind of an adapter's head: its manifest's, else the first one of its PEFT task type; None without one.

    Raises:
        PlanError: the package that provides this kind of head is not installed.
    """
    task_type, entry = source.meta.task_type, source.meta.manifest.get("task")
    usual = next(
        (kind.form for kind in HEADS.values() if kind.form.task_type and kind.form.task_type == task_type), None
    )
    entry = entry if isinstance(entry, Mapping) else {}
    name = entry.get("head")
    if not isinstance(name, str):
        return usual
    if name in HEADS:
        form = HEADS[name].form
        # PEFT has no task type for a head of this package, which has an entry `reader`.
        return form if usual or form.task_type == task_type or entry.get("reader") else None
    if not usual and not source.meta.saved_modules:
        return None
    raise PlanError(
        f"adapter '{source.name}' has a head of kind {name!r}, which no installed package provides. Install the "
        f"package that has the entry point {name!r} in the group {HEADS.group}.",
        code="head.not-installed",
    )


def _head(task: Task, source: AdapterSource, form: HeadForm, names: Sequence[str], base: str) -> Head:
    entry = source.meta.manifest.get("task")
    entry = entry if isinstance(entry, Mapping) else {}
    kind = HEADS[form.name]
    if not kind.suits(task) or entry.get("name", task.name) != task.name:
        raise PlanError(
            f"adapter '{source.name}' ends in {form.title}"
            + (f" for task '{entry['name']}'" if "name" in entry else "")
            + f", not for task '{task.name}'. Pass the task that it was trained for.",
            code="head.task",
        )
    listed = entry.get("labels")
    known = tuple(map(str, listed)) if isinstance(listed, list) else ()
    if known and names and known != tuple(names):
        raise PlanError(
            f"--labels is for heads whose adapter lists none, and '{source.name}' lists {', '.join(known)}: drop it.",
            code="head.labels-listed",
        )
    labels = known or tuple(names) or (form.outputs is None and labels_of_model(base)) or kind.labels(task, [])
    if not labels:
        raise PlanError(
            f"the labels of the head of '{source.name}' must be known, and its adaptermix.json, the base model and the "
            "task list none. Name its outputs in their order, such as --labels negative,neutral,positive.",
            code="head.unknown-labels",
        )
    _check_count(source, form, labels)
    return Head(form=form, labels=labels, reader=Reader.of(entry.get("reader")))


def labels_of_model(reference: str) -> tuple[str, ...]:
    """Return the labels that a model's configuration names, in the order of its outputs; none without names."""
    if not reference or (Path(reference) / STACK).exists():
        return ()
    named = load_config(reference).id2label or {}
    labels = tuple(str(named[number]) for number in sorted(named))
    return () if any(map(_UNNAMED.fullmatch, labels)) else labels


def _check_count(source: AdapterSource, form: HeadForm, labels: Sequence[str]) -> None:
    """Refuse labels that are more or fewer than the outputs of an adapter's head."""
    last = tuple(f"{module}.weight" for module in (*form.modules, "out_proj"))
    outputs = {header.shape[0] for name, header in source.saved_headers.items() if name.endswith(last)}
    if form.outputs is None and outputs and len(labels) not in outputs:
        raise PlanError(
            f"the head of '{source.name}' has {max(outputs)} outputs, and {len(labels)} labels are known "
            f"({', '.join(labels)}). Name all outputs in their order with --labels.",
            code="head.label-count",
        )
