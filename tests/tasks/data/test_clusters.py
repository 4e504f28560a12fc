"""Rows say which group of dependent rows they belong to, in every format with named columns or fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermix.tasks import clusters_of, get_task

ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(4)],
    "nli": [{"premise": f"p{n}", "hypothesis": "h", "label": "neutral"} for n in range(4)],
    "qa": [{"question": "q?", "context": f"c{n}", "answers": [f"c{n}"]} for n in range(4)],
    "slots": [{"text": f"t{n}", "slots": [{"type": "x", "value": f"t{n}"}]} for n in range(4)],
    "ner-json": [{"tokens": ["a", f"t{n}"], "ner_tags": ["O", "B-x"]} for n in range(4)],
    "sft": [{"prompt": f"p{n}", "answer": "a"} for n in range(4)],
}


@pytest.mark.parametrize("name", ["cluster", "document_id", "doc_id", "docid"])
@pytest.mark.parametrize("task", ROWS)
def test_jsonl(task: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "en.jsonl"
    path.write_text("".join(json.dumps({**row, name: n // 2}) + "\n" for n, row in enumerate(ROWS[task])))
    rows, _ = get_task(task).read([str(path)], rows=None)
    assert clusters_of(get_task(task), rows) == ["0", "0", "1", "1"]


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_tables(suffix: str, tmp_path: Path) -> None:
    mark = {"tsv": "\t", "csv": ","}[suffix]
    path = tmp_path / f"en.{suffix}"
    table = [("doc_id", "text", "label"), ("d1", "a b", "x"), ("d1", "c d", "y"), ("d2", "e f", "x")]
    path.write_text("".join(mark.join(row) + "\n" for row in table))
    rows, _ = get_task("classify").read([str(path)], rows=None)
    assert clusters_of(get_task("classify"), rows) == ["d1", "d1", "d2"]


def test_rows_without_groups_are_independent(tmp_path: Path) -> None:
    path = tmp_path / "en.jsonl"
    path.write_text("".join(json.dumps({**row, "doc_id": n}) + "\n" for n, row in enumerate(ROWS["classify"])))
    rows, _ = get_task("classify").read([str(path)], rows=None)
    assert clusters_of(get_task("classify"), rows) is None
