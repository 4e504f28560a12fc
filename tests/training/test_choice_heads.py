"""The head that scores choices, trained on every kind of base model, through merging, search and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix import (
    AlignSettings,
    EvaluateSettings,
    SearchSettings,
    TaskSettings,
    evaluate,
    load_adapter,
    merge,
    search,
    train_align,
    train_stack,
    train_task,
)

from ..refusals import refuses
from .data import write_pairs
from .stacks import stack_settings
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LINES: list[dict[str, Any]] = [
    {"context": "a sky", "question": "warm?", "choices": ["red", "blue", "sky"], "answer": "red"},
    {"context": "a sea", "question": "warm?", "choices": ["blue", "red"], "answer": "red"},
    {"context": "red red", "question": "warm?", "choices": ["green", "sky", "blue", "red"], "answer": "red"},
    {"context": "blue", "question": "warm?", "choices": ["green", "red"], "answer": "red"},
]


def write(folder: Path, name: str) -> str:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(folder / name)


def settings_for(base: Path, folder: Path, **more: object) -> TaskSettings:
    own = {"task": "choice", "train": [write(folder, "train.en.jsonl")], "steps": 30, "learning_rate": 1e-3}
    return TaskSettings(**values(base, folder, **(own | more)))


def evaluated(base: Path, adapter: Path, folder: Path, **more: object) -> EvaluateSettings:
    data = [write(folder, "test.de.jsonl")]
    own = {"base": str(base), "adapter": str(adapter), "task": "choice", "data": data}
    return EvaluateSettings(**(own | {"dtype": "float32", "device": "cpu"} | more))


@pytest.fixture(scope="module", params=["encoder", "causal", "stack"])
def base(
    request: pytest.FixtureRequest, encoder: Path, causal: Path, below: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param != "stack":
        return encoder if request.param == "encoder" else causal
    folder = tmp_path_factory.mktemp("choices")
    train_stack(stack_settings(causal, below, folder, steps=1))
    return folder / "stack"


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_task(settings_for(base, folder, head="choices", head_learning_rate=0.05))
    return folder / "out"


def test_the_head_learns_chooses_and_travels_with_the_adapter(base: Path, trained: Path, tmp_path: Path) -> None:
    predictions = tmp_path / "answers.jsonl"
    found = evaluate(evaluated(base, trained, tmp_path, predictions=str(predictions)))
    assert list(found.answers) == ["1", "2", "4", "2"]
    assert found.scores["de"].value == found.others["accuracy_norm"]["de"].value == 1
    assert len(predictions.read_text().splitlines()) == len(LINES)
    task = json.loads((trained / "adaptermix.json").read_text())["task"]
    assert (task["head"], task["labels"]) == ("choices", ["choice"])
    assert "adaptermix evaluate" in (trained / "README.md").read_text()
    merge([trained, trained], weights=[0.5, 0.5], saved="average", out=tmp_path / "merged")
    (head,) = load_adapter(trained).saved.values()
    (averaged,) = load_adapter(tmp_path / "merged").saved.values()
    assert head.shape[0] == 1
    torch.testing.assert_close(averaged, head)
    assert evaluate(evaluated(base, tmp_path / "merged", tmp_path)).answers == found.answers


def test_weights_are_searched_and_settings_of_the_head_apply(encoder: Path, tmp_path: Path) -> None:
    train_task(
        settings_for(encoder, tmp_path, head_layers="last+2", head_learning_rate=0.05)
    )  # the head of encoders for this task
    align = values(encoder, tmp_path, pairs=write_pairs(tmp_path), out=str(tmp_path / "other"), learning_rate=1e-3)
    train_align(AlignSettings(**align))
    result = search(
        SearchSettings(
            adapters=[str(tmp_path / "out"), str(tmp_path / "other")],
            base=str(encoder),
            task="choice",
            dev=[write(tmp_path, "dev.de.jsonl")],
            grid=[1.0, 0.0],
            out=str(tmp_path / "best"),
            dtype="float32",
            device="cpu",
        )
    )
    assert result.scores[0].value == 1
    assert evaluate(evaluated(encoder, tmp_path / "best", tmp_path)).scores["de"].value == 1


def test_language_models_choose_by_likelihood_without_the_option(causal: Path, tmp_path: Path) -> None:
    train_task(settings_for(causal, tmp_path, steps=1))
    assert not load_adapter(tmp_path / "out").saved
    assert all("[" in answer for answer in evaluate(evaluated(causal, tmp_path / "out", tmp_path)).answers)


def test_it_needs_choices(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "en.tsv").write_text("red\twarm\nblue\tcold\n")
    with refuses("train.head-kind: choices.*a task with choices in one text.*classify"):
        train_task(settings_for(encoder, tmp_path, task="classify", train=[str(tmp_path / "en.tsv")], head="choices"))
