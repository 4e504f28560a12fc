"""The laws of tasks hold for our own, and notice tasks that break them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adaptermix.tasks import TASKS, Metric, Task
from adaptermix.tasks.classify import Classify, ClassifyRow
from adaptermix.tasks.metrics import mean
from adaptermix.testing import TaskLaws


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class TestClassify(TaskLaws):
    task = TASKS["classify"]
    data = {"de.csv": "text,label\nrot,a\nblau,b\ngelb,a\n"}


class TestNli(TaskLaws):
    task = TASKS["nli"]
    data = {"de.tsv": "rot\tblau\tneutral\nrot\tRot\tentailment\nrot\tnicht rot\tcontradiction\n"}


class TestPairs(TaskLaws):
    task = TASKS["pairs"]
    data = {"de.tsv": "wer ging\tAda ging\t1\nwer ging\tes regnet\t0\nwo\tin Rom\t1\n"}


class TestPos(TaskLaws):
    task = TASKS["pos"]
    data = {"de.tsv": "Ada\tPROPN\nging\tVERB\n.\tPUNCT\n\nEs\tPRON\nregnet\tVERB\n\nHallo\tINTJ\n"}


class TestRanking(TaskLaws):
    task = TASKS["ranking"]
    data = {
        "de.tsv": "rad\tRad kaufen\tBei uns.\t3\nrad\tRom\tEine Stadt.\t0\nrad\tRad\tWikipedia.\t1\n"
        "rom\tRom\tEine Stadt.\t4\nrom\tRad\tWikipedia.\t0\nei\tEi\tEin Ei.\t2\nei\tRad\tx\t1\n"
    }


class TestChoice(TaskLaws):
    task = TASKS["choice"]
    data = {
        "de.jsonl": jsonl(
            {"premise": "Ada fror", "choice1": "Es schneite.", "choice2": "Sie sang.", "question": "cause", "label": 0},
            {"premise": "Ada fror", "choice1": "Sie sang.", "choice2": "Sie lief.", "question": "effect", "label": 1},
            {
                "question": "Wo liegt Rom?",
                "choices": ["hier", "da", "dort"],
                "answer": "dort",
                "context": "Rom ist dort.",
            },
        )
    }


class TestNerJson(TaskLaws):
    task = TASKS["ner-json"]
    data = {"de.iob2": "Ada\tB-PER\nLovelace\tI-PER\nging\tO\n\nBath\tB-LOC\n\nEs\tO\nregnet\tO\n"}


class TestSlots(TaskLaws):
    task = TASKS["slots"]
    data = {"de.tsv": "um acht\tO B-time\nin Rom Rom\tO B-city B-city\nhallo\tO\n"}


class TestQa(TaskLaws):
    task = TASKS["qa"]
    context = "Ada wohnt in  Bath, und Bob wohnt in Rom."
    data = {
        "de.jsonl": jsonl(
            {"question": "Wo wohnt Ada?", "context": context, "answers": ["Bath"]},
            {"question": "Wo wohnt Bob?", "context": context, "answers": ["in Rom", "Rom"]},
            {"question": "Wo wohnt Eva?", "context": context, "answers": []},
        )
    }


class TestTranslate(TaskLaws):
    task = TASKS["translate"]
    data = {"de-en.tsv": "Das Haus ist rot.\tThe house is red.\nJa.\tYes.\nHallo Welt\tHello world\n"}


class TestSft(TaskLaws):
    task = TASKS["sft"]
    data = {
        "de.jsonl": jsonl(
            {"prompt": "Sag hallo", "answer": "hallo"},
            {"instruction": "Was ist das?", "input": "Ein Ei", "output": "ein\nEi"},
            {"messages": [{"role": "user", "content": "Na?"}, {"role": "assistant", "content": "Gut."}]},
        )
    }


def test_every_task_is_held_to_the_laws() -> None:
    assert {laws.task.name for laws in TaskLaws.__subclasses__() if laws.__module__ == __name__} == set(TASKS)


class Loose(Classify):
    """Its rows are picked nowhere."""

    def read(self, arguments: Sequence[str], *, rows: str | None = None) -> Any:
        return super().read(arguments, rows=None)


class Blind(Classify):
    """Its templates do not show the text."""

    templates = {"plain": next(iter(Classify.templates.values())).__class__(name="plain", prompt="Label:")}


class Ragged(Classify):
    """Its metric has more counts for wrong answers than for right ones."""

    def metrics(self, rows: Sequence[ClassifyRow]) -> tuple[Metric, ...]:
        return (Metric(name="odd", count=lambda row, text: (1, 1) if text == row.label else (0, 1, 0), value=mean),)


class Backwards(Classify):
    """Its metric prefers wrong answers."""

    def metrics(self, rows: Sequence[ClassifyRow]) -> tuple[Metric, ...]:
        return (Metric(name="error", count=lambda row, text: (text != row.label, 1), value=mean),)


class Fragile(Classify):
    """Its metric fails on answers without a word."""

    def metrics(self, rows: Sequence[ClassifyRow]) -> tuple[Metric, ...]:
        return (Metric(name="first", count=lambda row, text: (text.split()[0] == row.label, 1), value=mean),)


class Scalar(Classify):
    """Its metric takes the sums of one resample only."""

    def metrics(self, rows: Sequence[ClassifyRow]) -> tuple[Metric, ...]:
        return (Metric(name="share", count=lambda row, text: (text == row.label, 1), value=lambda s: s.ravel()[0]),)


class Foreign(Classify):
    """Its labels are not its answers."""

    def labels(self, rows: Sequence[ClassifyRow]) -> tuple[str, ...]:
        return ("yes", "no")


class Forgetful(Classify):
    """Its rows lose the answer that a model gave."""

    def labelled(self, row: ClassifyRow, answer: str) -> ClassifyRow:
        return row


BROKEN = [
    (Loose, "test_rows_can_be_picked"),
    (Blind, "test_every_template_can_be_filled_in"),
    (Ragged, "test_any_answer_can_be_scored"),
    (Backwards, "test_right_answers_have_the_best_score"),
    (Fragile, "test_any_answer_can_be_scored"),
    (Scalar, "test_values_are_functions_of_sums"),
    (Foreign, "test_labels_are_the_answers"),
    (Forgetful, "test_answers_can_be_given_to_rows_without_any"),
]


@pytest.mark.parametrize(("broken", "law"), BROKEN, ids=[cls.__name__ for cls, _ in BROKEN])
def test_a_task_that_breaks_a_law_is_noticed(
    broken: type[Task], law: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    laws = TaskLaws()
    laws.task, laws.data = broken(), TestClassify.data
    path = tmp_path / "de.csv"
    path.write_text(TestClassify.data["de.csv"], encoding="utf-8")
    arguments = {"files": [str(path)]} if "picked" in law else {"rows": laws.task.read([str(path)])[0]}
    with pytest.raises((AssertionError, IndexError)):
        getattr(laws, law)(**arguments)
