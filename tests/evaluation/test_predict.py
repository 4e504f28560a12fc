"""Answers of adapters to texts, side by side, are those of `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adaptermix
from adaptermix.errors import AdapterMixError
from adaptermix.tasks import TASKS

TEXTS = ["wake me at six", "is it cold outside"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "en.csv"
    file.write_text("text,label\n" + "".join(f"{text},{text[:4]}\n" for text in TEXTS))
    return file


def trained(base: Path, rows: Path, out: Path, seed: int = 0) -> str:
    adaptermix.train_task(
        base=str(base), task="classify", train=[str(rows)], out=str(out), steps=3, learning_rate=0.05, seed=seed
    )
    return str(out)


def test_answers_are_those_of_evaluate(causal: Path, rows: Path, tmp_path: Path) -> None:
    adapters = [trained(causal, rows, tmp_path / f"task{seed}", seed) for seed in (0, 1)]
    shown = adaptermix.predict(TEXTS, base=str(causal), adapter=[*adapters, "base"], max_new_tokens=5)
    assert shown.task == "classify"
    for name, folder in zip((*adapters, "base"), (*adapters, None), strict=True):
        scored = adaptermix.evaluate(
            base=str(causal), adapter=folder, task="classify", data=[str(rows)], max_new_tokens=5
        )
        assert shown.answers[name] == scored.answers


def test_a_head_gives_a_label(encoder: Path, rows: Path, tmp_path: Path) -> None:
    adapter = trained(encoder, rows, tmp_path / "task")
    shown = adaptermix.predict(TEXTS, base=str(encoder), adapter=[adapter])
    assert set(shown.answers[adapter]) <= {"wake", "is i"}
    with pytest.raises(AdapterMixError) as caught:
        adaptermix.predict(TEXTS, base=str(encoder), adapter=[adapter, "base"])
    assert caught.value.code == "predict.heads"


ROWS = {
    "classify": "a text",
    "slots": "a text",
    "ner-json": "a text",
    "translate": "a text",
    "sft": "a text",
    "nli": '{"premise": "a", "hypothesis": "b"}',
    "pairs": '{"sentence1": "a", "sentence2": "b"}',
    "qa": '{"question": "a", "context": "b"}',
    "choice": '{"question": "a", "choices": ["b", "c"]}',
}


@pytest.mark.parametrize("task", ROWS)
def test_every_task_whose_rows_can_lack_an_answer(task: str, causal: Path) -> None:
    language = "de-en" if task == "translate" else "en"
    most = {} if task == "choice" else {"max_new_tokens": 2}
    shown = adaptermix.predict([ROWS[task]], base=str(causal), task=task, language=language, **most)
    assert len(shown.answers["base"]) == 1


def test_the_other_tasks_are_refused_by_name(causal: Path) -> None:
    others = sorted({*TASKS} - {*ROWS})
    assert others == ["pos", "ranking"]
    for task in others:
        with pytest.raises(AdapterMixError) as caught:
            adaptermix.predict(["a text"], base=str(causal), task=task)
        assert caught.value.code == "predict.task"


@pytest.mark.parametrize(
    ("texts", "task", "code"),
    [
        (["a text"], None, "predict.no-task"),
        (["a text"], "nli", "predict.fields"),
        (['{"premise": '], "nli", "predict.json"),
        (['{"premise": "a"}'], "nli", "row.missing-field"),
    ],
)
def test_wrong_texts_are_refused(texts: list[str], task: str | None, code: str, causal: Path) -> None:
    with pytest.raises(AdapterMixError) as caught:
        adaptermix.predict(texts, base=str(causal), task=task)
    assert caught.value.code == code


def test_a_file_has_a_text_in_each_line(causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n\n")
    from adaptermix.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["predict", "--file", str(file), "--base", str(causal), "--task", "classify", "--json"])
    assert not stopped.value.code
    document = json.loads(capsys.readouterr().out)
    assert document["texts"] == TEXTS
    assert len(document["answers"]["base"]) == 2
