"""A dry run builds the model without weights: it counts what the run would train, and refuses what the run would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptermix import AlignSettings, JointSettings, TaskSettings, train_align, train_joint, train_task
from adaptermix.errors import AdapterMixError, ModelError, PlanError

from ..factories import write_lora
from .data import write_pairs, write_slots

KINDS: dict[str, tuple[Any, Any]] = {
    "align": (AlignSettings, train_align),
    "task": (TaskSettings, train_task),
    "joint": (JointSettings, train_joint),
}


def run(kind: str, base: Path, folder: Path, **more: Any) -> Any:
    make, train = KINDS[kind]
    values: dict[str, Any] = {"base": str(base), "out": str(folder / "out"), "dtype": "float32", "device": "cpu"}
    values |= {"steps": 1, "batch_size": 4}
    values |= {} if kind == "task" else {"pairs": write_pairs(folder)}
    values |= {} if kind == "align" else {"task": "slots", "train": [write_slots(folder)]}
    return train(make(**values | more))


@pytest.mark.parametrize("more", [{}, {"rank": 3, "blocks": "0-1"}, {"targets": ["q_proj"]}, {"dora": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_counts_the_parameters_of_the_run(kind: str, more: dict[str, Any], any_causal: Path, tmp_path: Path) -> None:
    dry = run(kind, any_causal, tmp_path, dry_run=True, **more)
    assert not (tmp_path / "out").exists()
    assert dry.document()["lora_parameters"] == run(kind, any_causal, tmp_path, **more).parameters


@pytest.mark.parametrize(
    ("kind", "more", "error"),
    [
        ("align", {"layer": 99}, ModelError),
        ("joint", {"layer": 99}, ModelError),
        ("align", {"blocks": "0-3"}, PlanError),
        ("align", {"targets": ["nothing"]}, PlanError),
        ("task", {"blocks": "0-99"}, PlanError),
        ("task", {"head_learning_rate": 0.1}, PlanError),
        ("joint", {"head_learning_rate": 0.1}, PlanError),
        ("task", {"head": "classes"}, PlanError),
        ("align", {"targets": ["lm_head"]}, PlanError),
        ("task", {"device": "cuda:63"}, ModelError),
        ("align", {"on_top_of": "no/such"}, AdapterMixError),
        ("task", {"on_top_of": "{other}"}, AdapterMixError),
    ],
    ids=str,
)
def test_it_refuses_what_the_run_refuses(
    kind: str, more: dict[str, Any], error: type[AdapterMixError], causal: Path, tmp_path: Path
) -> None:
    said = []
    write_lora(tmp_path / "other", {"encoder.layer.0.attention.self.query": (7, 7, 2)})
    more = {key: str(tmp_path / "other") if value == "{other}" else value for key, value in more.items()}
    for dry_run in (True, False):
        with pytest.raises(error) as caught:
            run(kind, causal, tmp_path, dry_run=dry_run, **more)
        said.append(str(caught.value))
        assert not (tmp_path / "out").exists()
    assert said[0] == said[1]
