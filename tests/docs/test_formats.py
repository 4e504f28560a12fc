"""Every example of docs/formats.md is read by the task that it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adaptermix.tasks import TASKS
from adaptermix.tasks.data.pairs import read_pairs

PAGE = Path(__file__).parent.parent.parent / "docs" / "formats.md"
_EXAMPLE = re.compile(r"<!-- file: (\S+), (?:task: (\S+)|pairs) -->\n```text\n(.*?)```", re.DOTALL)
EXAMPLES = _EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "task", "text"), EXAMPLES, ids=[f"{task}-{name}" for name, task, _ in EXAMPLES])
def test_the_example_is_read(name: str, task: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    if task:
        rows, files = TASKS[task].read([str(file)])
    else:
        rows, files = read_pairs([str(file)])
    assert rows
    assert not any(each.left_out for each in files)


@pytest.mark.parametrize("name", TASKS)
def test_the_table_has_the_metrics_of_the_task(name: str, tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \[`{name}`\].*\| (.*) \|$", page, re.MULTILINE)
    file, text = next((file, text) for file, task, text in EXAMPLES if task == name)
    (tmp_path / file).write_text(text, encoding="utf-8")
    rows, _ = TASKS[name].read([str(tmp_path / file)])
    assert re.findall(r"`(\w+)`", row) == [metric.name for metric in TASKS[name].metrics(rows)]
