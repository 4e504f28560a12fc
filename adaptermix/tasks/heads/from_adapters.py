"""Heads of adapters, and the prompt templates that they were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...adapters import AdapterSource
from ...errors import PlanError
from ...models.head_forms import Head, HeadForm, Reader
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


def head_of(task: Task, sources: Sequence[AdapterSource], rows: Sequence[Row]) -> Head | None:
    """Return the head of adapters, None if they have no head.

    Its labels are those of the adapter's manifest; for adapters of other tools the task's fixed labels.

    Raises:
        PlanError: the head was trained for another task or lacks all labels of the rows, adapters differ in their
            heads, or the labels or the kind of head are not known.
    """
    forms = [(source, form) for source in sources if (form := form_of_head(source))]
    heads = {source.name: _head(task, source, form) for source, form in forms}
    if not heads:
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


def _head(task: Task, source: AdapterSource, form: HeadForm) -> Head:
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
    named = entry.get("labels")
    labels = tuple(map(str, named)) if isinstance(named, list) else kind.labels(task, [])
    if not labels:
        raise PlanError(
            f"the labels of the head of '{source.name}' must be known, but neither its adaptermix.json nor the task "
            "lists them.",
            code="head.unknown-labels",
        )
    return Head(form=form, labels=labels, reader=Reader.of(entry.get("reader")))
