"""Rows and adapters in memory as arguments of functions: the same scores as from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adaptermix
from tests.factories import write_lora
from tests.refusals import refuses

ROWS = [
    {"text": "wake me", "label": "alarm", "language": "en"},
    {"text": "weck mich", "label": "alarm", "language": "de"},
    {"text": "es regnet", "label": "weather", "language": "de"},
]
PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def common(causal: Path) -> dict[str, Any]:
    return {"base": causal, "task": "classify", "max_new_tokens": 2, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for language in ("en", "de"):
        lines = [json.dumps(row) for row in ROWS if row["language"] == language]
        (tmp_path / f"{language}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [tmp_path / "en.jsonl", tmp_path / "de.jsonl"]


def as_dataset(rows: list[dict[str, str]]) -> Any:
    from datasets import ClassLabel, Dataset

    return Dataset.from_list(rows).cast_column("label", ClassLabel(names=["alarm", "weather"]))


@pytest.mark.parametrize("form", ["list", "mapping", "dataset", "datasets by language"])
def test_evaluate_on_rows_in_memory_equals_files(
    form: str, common: dict[str, Any], files: list[Path], tmp_path: Path
) -> None:
    unnamed = {
        language: [{"text": row["text"], "label": row["label"]} for row in ROWS if row["language"] == language]
        for language in ("en", "de")
    }
    data = {
        "list": ROWS,
        "mapping": unnamed,
        "dataset": as_dataset(ROWS),
        "datasets by language": {language: as_dataset(rows) for language, rows in unnamed.items()},
    }[form]
    from_files = adaptermix.evaluate(data=files, predictions=tmp_path / "files.jsonl", **common).document()
    here = adaptermix.evaluate(data=data, predictions=tmp_path / "here.jsonl", **common).document()
    assert here["scores"] == from_files["scores"]
    assert here["groups"] == from_files["groups"]
    answers = [
        [json.loads(line)["answer"] for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        for name in ("files.jsonl", "here.jsonl")
    ]
    assert answers[0] == answers[1]


def test_rows_with_other_columns(common: dict[str, Any], files: list[Path]) -> None:
    rows = [{"said": row["text"], "what": row["label"], "tongue": row["language"]} for row in ROWS]
    columns = {"text": "said", "label": "what", "language": "tongue"}
    here = adaptermix.evaluate(data=rows, columns=columns, **common).document()
    assert here["scores"] == adaptermix.evaluate(data=files, **common).document()["scores"]


def test_training_and_search_take_rows_and_adapters(common: dict[str, Any], files: list[Path], tmp_path: Path) -> None:
    training = {key: common[key] for key in ("base", "task", "device", "dtype")}
    adaptermix.train_task(train=ROWS, steps=1, rank=2, out=tmp_path / "task", **training)
    pairs = {"de-en": [{"source": "weck mich", "target": "wake me"}, {"source": "es regnet", "target": "it rains"}]}
    shared = {key: common[key] for key in ("base", "device", "dtype")}
    adaptermix.train_align(pairs=pairs, steps=1, rank=2, batch_size=2, out=tmp_path / "align", **shared)
    state = adaptermix.load_adapter(tmp_path / "task")
    found = adaptermix.search(
        [state, tmp_path / "align"], dev=ROWS, grid=[0.5, 1.0], out=tmp_path / "here", **common
    ).document()
    of_files = adaptermix.search(
        [tmp_path / "task", tmp_path / "align"], dev=files, grid=[0.5, 1.0], out=tmp_path / "files", **common
    ).document()
    assert [trial["value"] for trial in found["trials"]] == [trial["value"] for trial in of_files["trials"]]
    assert adaptermix.evaluate(adapter=state, data=ROWS, **common).document()["scores"]


def test_no_file_is_left(common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    write_lora(tmp_path / "lora", {PATH: (32, 32, 2)}, alpha=4)
    adaptermix.evaluate(adapter=adaptermix.load_adapter(tmp_path / "lora"), data=ROWS, **common)
    assert [path for path in folder.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("data", [{"de": []}, {"de": ["x"]}, {"de": "rows"}, {"de": {"text": "x"}}])
def test_other_rows_are_refused(data: object, common: dict[str, Any]) -> None:
    with refuses("call.rows"):
        adaptermix.evaluate(data=data, **common)


def test_rows_without_a_json_form_are_refused(common: dict[str, Any]) -> None:
    with refuses("call.rows-json"):
        adaptermix.evaluate(data=[{"text": object(), "label": "x"}], **common)
