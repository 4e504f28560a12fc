"""The table of tasks, and the settings' texts that name what it holds."""

from __future__ import annotations

from adaptermix.options import TASK, TaskOptions
from adaptermix.options.registries import OneOf
from adaptermix.tasks import TASKS
from adaptermix.tasks.heads import HEADS, suiting


def test_help_names_every_task_and_no_other() -> None:
    assert f"task: {', '.join(sorted(TASKS))}, or one of another package" == TASK


def test_the_choices_of_heads_are_those_of_the_table():
    field = TaskOptions.model_fields["head"]
    (names,) = [mark.choices for mark in field.metadata if isinstance(mark, OneOf)]
    assert set(names) == {"auto", "none", *HEADS}
    for name, head in HEADS.items():
        suited = [task for task in TASKS.values() if head.suits(task)]
        assert suited
        assert name in field.description
        assert all(task.name in field.description for task in suited)


SUITED = {
    "classes": {"classify", "nli", "pairs", "ranking"},
    "tokens": {"slots", "ner-json", "pos"},
    "span": {"qa"},
    "choices": {"choice"},
}


def test_the_head_of_each_task():
    assert {name: {task for task in TASKS if head.suits(TASKS[task])} for name, head in HEADS.items()} == SUITED
    heads = {task: name for name, tasks in SUITED.items() for task in tasks}
    found = {name: suiting(task) for name, task in TASKS.items()}
    assert {name: head.form.name for name, head in found.items() if head} == heads
    assert {name for name, head in found.items() if head is None} == {"sft", "translate"}
