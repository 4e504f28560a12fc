"""Answers of adapters to texts without right answers, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters import AdapterSource, open_adapter
from ..errors import DataError, UsageError
from ..io.json_types import JsonObject
from ..io.report_view import ResultView
from ..io.temporary import temporary_folder
from ..merging.on_model import acting
from ..models.base import load_base, note_other_base, require_causal
from ..options import PredictSettings
from ..progress import SILENT, Watcher
from ..tasks import Task, get_task
from ..tasks.base import ComparableTask
from ..tasks.data.tables import Row
from ..tasks.heads.from_adapters import form_of_head, head_of, template_of
from .answering import Answering
from .run import BASE


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Prediction(ResultView):
    """Answers to texts.

    Args:
        task: Name of the task.
        texts: The texts.
        answers: Answers by system, one per text.
    """

    task: str
    texts: Sequence[str]
    answers: Mapping[str, Sequence[str]]

    def document(self) -> JsonObject:
        """Return the JSON document of `adaptermix predict`."""
        return {
            "task": self.task,
            "texts": list(self.texts),
            "answers": {name: list(answers) for name, answers in self.answers.items()},
        }


def _task_of(settings: PredictSettings, sources: Mapping[str, AdapterSource | None]) -> Task:
    if settings.task:
        return get_task(settings.task)
    entries = [source.meta.manifest.get("task") for source in sources.values() if source]
    named = next((entry["name"] for entry in entries if isinstance(entry, Mapping) and "name" in entry), None)
    if not isinstance(named, str):
        raise UsageError(
            "--task must be given where no adapter has a task in its adaptermix.json.", code="predict.no-task"
        )
    return get_task(named)


def _texts(settings: PredictSettings) -> list[str]:
    if settings.file is None:
        return list(settings.inputs)
    try:
        text = Path(settings.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--file must be a text file in UTF-8, and {settings.file} cannot be read: {error}.", code="predict.file"
        ) from error
    return [line for line in text.splitlines() if line.strip()]


def _fields(task: Task, text: str, blank: JsonObject) -> JsonObject:
    """Return a text as the fields of a JSONL row, with a placeholder as its answer."""
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"a text that starts with {{ must be a JSON object: {error}.", code="predict.json"
            ) from error
        return {**blank, **fields}
    field = getattr(task, "text_field", None)
    if field is None:
        raise UsageError(
            f"a row of task '{task.name}' has several fields: give a JSON object for each row, with the fields of "
            "docs/formats.md.",
            code="predict.fields",
        )
    return {**blank, field: text}


def _rows(task: Task, texts: Sequence[str], language: str) -> Sequence[Row]:
    """Return the rows of texts without answers.

    Raises:
        UsageError: rows of the task need an answer, or the task's rows have several texts and a text is not JSON.
        DataError: a JSON object lacks a field.
    """
    if isinstance(task, ComparableTask) and not any(text.lstrip().startswith("{") for text in texts):
        return [task.unlabelled(text, language) for text in texts]
    blank = getattr(task, "blank", None)
    if blank is None:
        raise UsageError(
            f"rows of task '{task.name}' need their right answers. Use `adaptermix evaluate --predictions FILE`.",
            code="predict.task",
        )
    with temporary_folder() as folder:
        file = folder / "texts.jsonl"
        lines = [json.dumps(_fields(task, text, dict(blank)), ensure_ascii=False) + "\n" for text in texts]
        file.write_text("".join(lines), encoding="utf-8")
        rows, _ = task.read([f"{language}={file}"])
    if len(rows) != len(texts):
        raise DataError(
            f"each text must be a row, and {len(texts) - len(rows)} of {len(texts)} are empty or incomplete.",
            code="predict.rows",
        )
    return rows


def predict(settings: PredictSettings, *, watch: Watcher = SILENT) -> Prediction:
    """Return the answers of adapters, or of the base model, to texts.

    Raises:
        AdapterMixError: the model or an adapter is invalid, or a text does not have the fields of the task.
    """
    names = list(dict.fromkeys(settings.adapter)) or [BASE]
    sources = {name: None if name == BASE else open_adapter(Path(name)) for name in names}
    task = _task_of(settings, sources)
    texts = _texts(settings)
    rows = _rows(task, texts, settings.language)
    opened = [source for source in sources.values() if source]
    head = head_of(task, opened, [], names=settings.labels, base=settings.base)
    if head is None:
        require_causal(settings.base, f"without a head for it, task '{task.name}'")
    elif len(opened) < len(sources) or not all(map(form_of_head, opened)):
        raise UsageError(
            "adapters with a head can be shown only with others that have such a head. Leave out the base model and "
            "adapters without a head.",
            code="predict.heads",
        )
    base = load_base(settings.base, **settings.load_options(), head=head)
    note_other_base(base, opened, watch)
    answers: dict[str, Sequence[str]] = {}
    for name, source in sources.items():
        active = [source] if source else []
        template = template_of(task, active or opened, settings.template)
        with acting(base, active):
            answers[name] = Answering(base, task, rows, settings, template=template, watch=watch)(f"answer with {name}")
    return Prediction(task=task.name, texts=texts, answers=answers)
