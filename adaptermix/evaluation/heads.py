"""Answers of a classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapters import AdapterSource
from ..errors import PlanError
from ..models import BaseModel
from ..progress import SILENT, Watcher
from ..tasks import LabelTask, Task


@torch.inference_mode()
def tell(
    base: BaseModel,
    texts: Sequence[tuple[str, ...]],
    *,
    batch_size: int,
    max_length: int = 512,
    watch: Watcher = SILENT,
    label: str = "classify",
) -> list[str]:
    """Return the label of the largest logit per row.

    Args:
        base: A model with a classification head.
        texts: One or two texts per row; of two the longer one is cut.
        batch_size: Rows per batch; rows of like length are run together.
        max_length: Longest row in tokens.
        watch: Receives progress.
        label: Name of the progress bar.
    """
    encoded = [base.tokenizer(*row, truncation=True, max_length=max_length) for row in texts]
    order = sorted(range(len(texts)), key=lambda row: len(encoded[row]["input_ids"]))
    answers = [""] * len(texts)
    with watch.track(label, len(texts)) as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = base.tokenizer.pad([encoded[row] for row in rows], padding_side="right", return_tensors="pt")
            found = base.model(**batch.to(base.device)).logits.argmax(-1).tolist()
            for row, place in zip(rows, found, strict=True):
                answers[row] = base.labels[place]
            advance(len(rows), "")
    return answers


def labels_of(task: Task, sources: Sequence[AdapterSource], rows: Sequence[Any]) -> tuple[str, ...]:
    """Return the labels of the classification head that adapters bring; empty if they bring none.

    They are those of the adapter's manifest; for adapters made elsewhere those of a task whose labels are fixed.

    Raises:
        PlanError: the head was trained for another task or other labels than those of the rows, adapters differ in
            their labels, or the labels are not known.
    """
    heads = [source for source in sources if source.meta.task_type == "SEQ_CLS"]
    if not heads:
        return ()
    found = {_labels(task, source) for source in heads}
    if len(found) > 1:
        raise PlanError(f"adapters with heads must have the same labels, found {sorted(map(list, found))}.")
    labels = found.pop()
    new = sorted({task.answer(row) for row in rows} - set(labels))
    if new:
        raise PlanError(
            f"rows must have labels of the head of '{heads[0].name}' ({', '.join(labels)}), found {new[0]!r}. "
            "Give data of the task that it was trained for."
        )
    return labels


def _labels(task: Task, source: AdapterSource) -> tuple[str, ...]:
    entry = source.meta.manifest.get("task")
    entry = entry if isinstance(entry, Mapping) else {}
    if not isinstance(task, LabelTask) or entry.get("name", task.name) != task.name:
        raise PlanError(
            f"adapter '{source.name}' ends in a classification head"
            + (f" for task '{entry['name']}'" if "name" in entry else "")
            + f", and task '{task.name}' is asked for. Give the task that it was trained for."
        )
    named = entry.get("labels")
    labels = tuple(map(str, named)) if isinstance(named, list) else task.labels([])
    if not labels:
        raise PlanError(
            f"the labels of the head of '{source.name}' must be known, and neither its adaptermix.json nor the task "
            "tells them."
        )
    return labels
