"""Task training: answers are learned, and evaluation asks as training did."""

from __future__ import annotations

import json
from pathlib import Path

from adaptermix import EvaluateSettings, TaskSettings, evaluate, train_task

from ..refusals import refuses
from .data import write_slots


def settings_for(base: Path, folder: Path, **more: object) -> TaskSettings:
    values = {
        "base": str(base),
        "task": "slots",
        "train": [write_slots(folder)],
        "out": str(folder / "task"),
        "dtype": "float32",
        "device": "cpu",
        "steps": 8,
        "batch_size": 6,
        "learning_rate": 2e-2,
        "rank": 8,
        "dropout": 0.0,
        "schedule": "linear",
    }
    return TaskSettings(**(values | more))


def test_answers_are_learned_by_heart_and_scored_with_the_trained_template(causal: Path, tmp_path: Path) -> None:
    rows = [{"text": f"go {number}", "slots": [{"type": "c", "value": "x"}]} for number in range(6)]
    (tmp_path / "same.en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_task(settings_for(causal, tmp_path, train=[str(tmp_path / "same.en.jsonl")], steps=80, template="mid-align"))
    scored = EvaluateSettings(
        base=str(causal),
        adapter=str(tmp_path / "task"),
        task="slots",
        data=[str(tmp_path / "same.en.jsonl")],
        max_new_tokens=6,
        dtype="float32",
        device="cpu",
    )
    found = evaluate(scored)
    assert found.scores["en"].value == 1.0
    assert found.groups == {"supervised": found.scores["en"].value, "all": found.scores["en"].value}
    asked = scored.model_copy(update={"template": "mid-align"})
    assert evaluate(asked).answers == found.answers
    manifest = json.loads((tmp_path / "task" / "adaptermix.json").read_text())
    assert manifest["task"] == {"name": "slots", "template": "mid-align"}
    assert manifest["languages"] == {"supervised": ["en"]}


def test_dev_loss_is_logged_after_each_epoch_and_decides_nothing(causal: Path, tmp_path: Path) -> None:
    plain = settings_for(causal, tmp_path, batch_size=2, epochs=2, steps=None)
    train_task(plain)
    dev = write_slots(tmp_path, "dev.en.jsonl")
    watched = plain.model_copy(update={"dev": [dev], "out": str(tmp_path / "watched")})
    report = train_task(watched)
    logged = [entry["step"] for entry in report.history if "dev_loss" in entry]
    assert logged == [3, 6]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("task", "watched")]
    assert weights[0] == weights[1]
    lines = (tmp_path / "watched" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_rows_are_counted_for_the_epochs(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, rows=":4", batch_size=2, epochs=3, steps=None, dry_run=True)
    assert train_task(settings).steps == 6


def test_encoders_are_refused(encoder: Path, tmp_path: Path) -> None:
    with refuses("model.not-causal"):
        train_task(settings_for(encoder, tmp_path, head="none"))
    assert not (tmp_path / "task").exists()
