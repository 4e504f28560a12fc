"""Rows that lack a part are left out and counted, by every reader that lets them pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix.tasks import get_task

CASES: list[tuple[str, dict[str, str], list[int]]] = [
    ("sft", {"de.jsonl": '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n'}, [1]),
    ("nli", {"de.tsv": "a\tb\tneutral\na\tb\t-\na\tb\t-\n"}, [2]),
    ("translate", {"de-en.tsv": "a\tb\n\tc\nd\t\n"}, [2]),
    ("translate", {"x.de.txt": "a\n\nb\n", "x.en.txt": "a\nb\n\n"}, [2, 0]),
    ("translate", {"en-de.src.en": "a\nb\n", "en-de.ref.de": "a\n\n"}, [1, 0]),
]


@pytest.mark.parametrize(("name", "texts", "counts"), CASES)
def test_rows_left_out_are_counted_by_file(name: str, texts: dict[str, str], counts: list[int], tmp_path: Path) -> None:
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    rows, files = get_task(name).read([str(tmp_path / file) for file in texts], rows=None)
    assert [file.left_out for file in files] == counts
    assert len(rows) == 1
    rows, files = get_task(name).read([str(tmp_path / file) for file in texts], rows=":1")
    assert [file.left_out for file in files] == [0] * len(files)
