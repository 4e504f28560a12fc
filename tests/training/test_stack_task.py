"""Stacks that learn a task: stage 2, tuning and merges of adapters on a stack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptermix import evaluate, load_adapter, merge, train_stack, train_task
from adaptermix.models.base import load_base

from ..refusals import refuses
from .stacks import loaded, stack_settings, stage_2, write_texts
from .test_heads import evaluated, settings_for, write_labels


def test_stage_2_keeps_the_head_and_trains_the_lora_alone(stack: Path, teacher: Path, tmp_path: Path) -> None:
    names: set[str] = set()

    class Look:
        def on_step_end(self, _a: Any, _s: Any, _c: Any, *, model: nn.Module, **_: Any) -> None:
            names.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)

    report = train_stack(stage_2(stack, teacher, tmp_path, steps=30, learning_rate=0.01), callbacks=[Look()])
    assert names
    assert all("lora_" in name for name in names)
    first, last = (report.history[index]["loss"] for index in (0, -1))
    assert last < first
    student, taught = load_adapter(tmp_path / "out"), load_adapter(teacher)
    assert student.saved.keys() == taught.saved.keys()
    assert all(torch.equal(student.saved[key], taught.saved[key]) for key in taught.saved)
    found = evaluate(evaluated(stack, tmp_path / "out", write_labels(tmp_path, "test.de.tsv")))
    assert found.scores["de"].n == 12


@pytest.mark.parametrize("size", [5, 32])
def test_stored_targets_are_those_of_a_live_teacher(
    top: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("adaptermix.training.by_length._ROWS", size)
    from adaptermix.adapters import open_adapter
    from adaptermix.merging.on_model import acting
    from adaptermix.tasks import get_task
    from adaptermix.tasks.heads import HEADS
    from adaptermix.tasks.heads.from_adapters import head_of
    from adaptermix.training.stack_task import stored_vectors, vectors_of

    task = get_task("classify")
    rows, _ = task.read([write_labels(tmp_path)], rows=None)
    source = open_adapter(teacher)
    base = load_base(str(top), device="cpu", dtype="float32", head=head_of(task, [source], rows))
    encoded = HEADS["classes"].encode(base, task, rows, max_length=64)
    base.model.train()
    with acting(base, [source]):
        stored = stored_vectors(base, encoded)
        base.model.eval()
        with torch.no_grad():
            live = torch.cat([vectors_of(base, encoded, [row]) for row in range(len(rows))])
    torch.testing.assert_close(stored, live, atol=1e-6, rtol=1e-5)


def test_tuning_on_a_stack_and_merging_two_adapters_of_it(stack: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        settings = settings_for(stack, tmp_path, head="auto", steps=2, seed=seed, out=str(tmp_path / name))
        train_task(settings)
        reader = json.loads((tmp_path / name / "adaptermix.json").read_text())["task"]["reader"]
        assert reader["pooling"] == "mean"
    merge([tmp_path / "one", tmp_path / "two"], weights=[1.0, 1.0], saved="average", out=tmp_path / "both")
    one, two, both = (load_adapter(tmp_path / name).updates for name in ("one", "two", "both"))
    for path, update in both.items():
        expected = one[path].dense() + two[path].dense()
        torch.testing.assert_close(update.dense(), expected, atol=1e-6, rtol=1e-4)


def test_adapters_of_two_stacks_do_not_merge(stack: Path, top: Path, below: Path, tmp_path: Path) -> None:
    train_stack(stack_settings(top, below, tmp_path, steps=1, seed=5))
    for name, base in (("one", stack), ("two", tmp_path / "stack")):
        train_task(settings_for(base, tmp_path, head="auto", steps=1, out=str(tmp_path / name)))
    with refuses("adapters.bases"):
        merge([tmp_path / "one", tmp_path / "two"], weights=[1.0, 1.0], saved="average", out=tmp_path / "both")


def test_stage_2_needs_a_stack_and_a_teacher_with_a_pooled_head(causal: Path, below: Path, tmp_path: Path) -> None:
    train_task(settings_for(causal, tmp_path, steps=1, out=str(tmp_path / "plain")))
    with refuses("stack.no-stack"):
        train_stack(stage_2(causal, tmp_path / "plain", tmp_path))
    train_stack(stack_settings(causal, below, tmp_path, steps=1))
    with refuses("stack.teacher-head"):
        train_stack(stage_2(tmp_path / "stack", tmp_path / "plain", tmp_path))


def test_what_cannot_become_a_stack_is_refused(causal: Path, encoder: Path, below: Path, tmp_path: Path) -> None:
    train_stack(stack_settings(causal, below, tmp_path, steps=1))
    with refuses("stack.of-stacks"):
        train_stack(stack_settings(tmp_path / "stack", below, tmp_path, out=str(tmp_path / "two")))
    with refuses("stack.attention"):
        train_stack(stack_settings(encoder, below, tmp_path, attention="both", out=str(tmp_path / "two")))
    texts = [f"{code}={write_texts(tmp_path, f'{code}.txt')}" for code in ("de", "en")]
    with refuses("stack.languages"):
        train_stack(stack_settings(causal, below, tmp_path, texts=texts, out=str(tmp_path / "two")))
    train_task(settings_for(encoder, tmp_path, steps=1, head_pooling="mean", out=str(tmp_path / "other")))
    with refuses("stack.teacher-base"):
        train_stack(stage_2(tmp_path / "stack", tmp_path / "other", tmp_path))
    shutil.rmtree(tmp_path / "stack" / "adapter")
    with refuses("adapter.not-folder: adapter"):
        loaded(tmp_path / "stack")


def test_data_of_the_teacher_counts_as_seen(stack: Path, teacher: Path, tmp_path: Path) -> None:
    other = write_labels(tmp_path, "other.en.tsv", [("a new sky", "cold"), ("a new sea", "warm")])
    train_stack(stage_2(stack, teacher, tmp_path, train=[other]))
    known = json.loads((teacher / "adaptermix.json").read_text())["data"]
    seen = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["data"]
    assert {file["sha256"] for file in known} < {file["sha256"] for file in seen}
