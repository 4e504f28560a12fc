"""Translation, answers to prompts and to questions from file to score, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix import evaluate, train_task
from adaptermix.options import EvaluateSettings, TaskSettings

TURNS = [("user", "rot"), ("assistant", "red"), ("user", "blau"), ("assistant", "blue")]
MESSAGES = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
ASKED = {"question": "Wer?", "context": "Ada ging.", "answers": ["Ada"]}
DATA = {
    "translate": ("de-en.tsv", "rot\tred\nblau\tblue\n", "de-en", ["bleu", "chrf"]),
    "sft": ("de.jsonl", f'{{"prompt": "a", "answer": "b"}}\n{json.dumps(MESSAGES)}\n', "de", ["exact_match", "chrf"]),
    "qa": ("de.jsonl", f"{json.dumps(ASKED)}\n{json.dumps(ASKED | {'answers': []})}\n", "de", ["f1", "exact_match"]),
}


@pytest.mark.parametrize(
    ("task", "template"),
    [
        ("translate", "plain"),
        ("translate", "mid-align"),
        ("sft", "plain"),
        ("sft", "chat"),
        ("qa", "plain"),
        ("qa", "chat"),
    ],
)
def test_the_task_is_trained_and_scored(causal: Path, tmp_path: Path, task: str, template: str) -> None:
    name, text, language, metrics = DATA[task]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    out = str(tmp_path / "out")
    common = {"base": str(causal), "task": task, "device": "cpu", "dtype": "float32"}
    train_task(TaskSettings(train=[str(path)], out=out, steps=2, template=template, **common))  # type: ignore[arg-type]
    found = evaluate(EvaluateSettings(data=[str(path)], adapter=out, max_new_tokens=4, **common))  # type: ignore[arg-type]
    document = found.document()
    assert (document["task"], document["metric"], list(document["metrics"])) == (task, metrics[0], metrics)
    assert {name: list(scores) for name, scores in document["metrics"].items()} == {
        name: [language] for name in metrics
    }
    assert document["scores"][language]["n"] == 2
    assert list(document["groups"]) == ["supervised", "all"]
