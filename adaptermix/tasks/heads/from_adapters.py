"""What adapters bring to a task: a head, and the prompt template that they were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...adapters import AdapterSource
from ...errors import PlanError
from ...models.head_forms import Head, HeadForm, form_of
from .. import Task, get_template
from . import HEADS


def template_of(task: Task, sources: Sequence[AdapterSource], given: str | None) -> str:
    """Return the prompt template: as given, else the one an adapter was trained with for this task, else the default.

    Raises:
        PlanError: the task has none of this name.
    """
    entries = [source.meta.manifest.get("task") for source in sources]
    # a manifest is a file that people edit, so entries of another form are passed over
    trained = [entry.get("template") for entry in entries if isinstance(entry, Mapping)]
    named = given or next((name for name in trained if name and isinstance(name, str)), None)
    return get_template(task, named).name


def head_of(task: Task, sources: Sequence[AdapterSource], rows: Sequence[Any]) -> Head | None:
    """Return the head that adapters bring, None if they bring none.

    Its labels are those of the adapter's manifest; for adapters made elsewhere those that the task has fixed.

    Raises:
        PlanError: the head was trained for another task or has none of the labels of the rows, adapters differ in
            their heads, or the labels are not known.
    """
    forms = [(source, form) for source in sources if (form := _form(source))]
    heads = {source.name: _head(task, source, form) for source, form in forms}
    if not heads:
        return None
    kinds = sorted({head.form.name for head in heads.values()})
    if len(kinds) > 1:
        raise PlanError(
            f"adapters must have heads of one kind to be compared or searched, found {' and '.join(kinds)}."
        )
    found = {head.labels for head in heads.values()}
    if len(found) > 1:
        raise PlanError(f"adapters with heads must have the same labels, found {sorted(map(list, found))}.")
    name, head = next(iter(heads.items()))
    kind = HEADS[head.form.name]
    asked = kind.labels(task, rows)
    new = sorted(set(asked) - set(head.labels))
    if new and kind.closed and len(new) == len(asked):  # a few new labels are wrong answers, or rows left out
        raise PlanError(
            f"rows must have labels of the head of '{name}' ({', '.join(head.labels)}), found {new[0]!r}. "
            "Give data of the task that it was trained for."
        )
    return head


def _form(source: AdapterSource) -> HeadForm | None:
    """Return the kind of head of an adapter: that of its manifest, else the usual one of its PEFT task type."""
    usual, entry = form_of(source.meta.task_type), source.meta.manifest.get("task")
    name = entry.get("head") if usual and isinstance(entry, Mapping) else None
    return HEADS[name].form if isinstance(name, str) and name in HEADS else usual


def _head(task: Task, source: AdapterSource, form: HeadForm) -> Head:
    entry = source.meta.manifest.get("task")
    entry = entry if isinstance(entry, Mapping) else {}
    kind = HEADS[form.name]
    if not kind.suits(task) or entry.get("name", task.name) != task.name:
        raise PlanError(
            f"adapter '{source.name}' ends in {form.title}"
            + (f" for task '{entry['name']}'" if "name" in entry else "")
            + f", and task '{task.name}' is asked for. Give the task that it was trained for."
        )
    named = entry.get("labels")
    labels = tuple(map(str, named)) if isinstance(named, list) else kind.labels(task, [])
    if not labels:
        raise PlanError(
            f"the labels of the head of '{source.name}' must be known, and neither its adaptermix.json nor the task "
            "tells them."
        )
    return Head(form=form, labels=labels)
