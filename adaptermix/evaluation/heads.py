"""Answers of heads, and the head that adapters bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..adapters import AdapterSource
from ..errors import PlanError
from ..head_forms import Head, HeadForm, form_of
from ..heads import HEADS, HeadRows
from ..progress import SILENT, Watcher
from ..tasks import Task

LONGEST = 512
"""Most tokens that a model sees at once; there texts are cut, or read in windows where a question is on them."""


@torch.inference_mode()
def tell(
    encoded: HeadRows,
    *,
    batch_size: int,
    places: Sequence[int] | None = None,
    before: Callable[[Sequence[int]], None] = lambda _rows: None,
    watch: Watcher = SILENT,
    label: str = "answer",
) -> list[str]:
    """Return the answer to every row, or to some.

    Args:
        encoded: Rows, encoded for a model with a head.
        batch_size: Rows per batch; rows of like length are run together.
        places: Which rows, in this order; default all.
        before: Called before each batch with its rows.
        watch: Receives progress.
        label: Name of the progress bar.
    """
    asked = range(len(encoded.lengths)) if places is None else places
    order = sorted(asked, key=lambda row: encoded.lengths[row])
    answers: dict[int, str] = {}
    with watch.track(label, len(order)) as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            before(rows)
            answers |= zip(rows, encoded.answers(rows), strict=True)
            advance(len(rows), "")
    return [answers[row] for row in asked]


def head_of(task: Task, sources: Sequence[AdapterSource], rows: Sequence[Any]) -> Head | None:
    """Return the head that adapters bring, None if they bring none.

    Its labels are those of the adapter's manifest; for adapters made elsewhere those that the task has fixed.

    Raises:
        PlanError: the head was trained for another task or other labels than those of the rows, adapters differ in
            their heads, or the labels are not known.
    """
    forms = [(source, form) for source in sources if (form := form_of(source.meta.task_type))]
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
    new = sorted(set(kind.labels(task, rows)) - set(head.labels))
    if new and kind.closed:
        raise PlanError(
            f"rows must have labels of the head of '{name}' ({', '.join(head.labels)}), found {new[0]!r}. "
            "Give data of the task that it was trained for."
        )
    return head


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
