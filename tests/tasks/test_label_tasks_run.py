"""Classification, inference and named entities from file to score, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix import evaluate, train_task
from adaptermix.options import EvaluateSettings, TaskSettings

DATA = {
    "classify": ("de.csv", "text,label\nrot,a\nblau,b\n", ["accuracy", "macro_f1"]),
    "nli": ("de.tsv", "rot\tblau\tneutral\nrot\tRot\tentailment\n", ["accuracy", "macro_f1"]),
    "pairs": ("de.tsv", "rot\tblau\t0\nrot\tRot\t1\n", ["accuracy", "macro_f1"]),
    "pos": ("de.tsv", "Ada\tPROPN\nging\tVERB\n\nBath\tPROPN\n", ["accuracy", "macro_f1"]),
    "ranking": ("de.tsv", "a\tb\t1\na\tc\t0\nd\te\t0\nd\tf\t2\n", ["ndcg"]),
    "ner-json": ("de.iob2", "Ada\tB-PER\nging\tO\n\nBath\tB-LOC\n", ["tuple_f1", "entity_f1"]),
}


@pytest.mark.parametrize("task", DATA)
def test_the_task_is_trained_and_scored(causal: Path, tmp_path: Path, task: str) -> None:
    name, text, metrics = DATA[task]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    common = {"base": str(causal), "task": task, "device": "cpu", "dtype": "float32"}
    train_task(TaskSettings(train=[str(path)], out=str(tmp_path / "out"), steps=2, **common))  # type: ignore[arg-type]
    found = evaluate(
        EvaluateSettings(data=[str(path)], adapter=str(tmp_path / "out"), max_new_tokens=4, **common)  # type: ignore[arg-type]
    )
    document = found.document()
    assert (document["task"], document["metric"], list(document["metrics"])) == (task, metrics[0], metrics)
    assert {name: list(scores) for name, scores in document["metrics"].items()} == {name: ["de"] for name in metrics}
    assert document["scores"]["de"]["n"] == 2
    assert list(document["groups"]) == ["supervised", "all"]
