"""Heads of this package through the commands: trained, evaluated, merged, searched, continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix import (
    AlignSettings,
    JointSettings,
    SearchSettings,
    TaskSettings,
    evaluate,
    load_adapter,
    merge,
    search,
    train_align,
    train_joint,
    train_task,
)
from adaptermix.adapters import open_adapter

from ..refusals import refuses
from .data import Notes, write_pairs
from .test_heads import evaluated, settings_for, write_labels
from .test_joint import values

READERS = {
    "mean": {"head_pooling": "mean"},
    "block": {"head_layers": "2"},
    "fused": {"head_layers": "last+2", "gate_ratio": 4},
    "search": {"head_layers": "last+search"},
}


@pytest.fixture(scope="module", params=["encoder", "causal"])
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module", params=READERS)
def trained(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    train_task(settings_for(base, folder, steps=20, **READERS[request.param]))
    return folder / "out"


def searched(base: Path, *adapters: Path) -> dict[str, Any]:
    names = [str(adapter) for adapter in adapters]
    return {"base": str(base), "adapters": names, "task": "classify", "dtype": "float32", "device": "cpu"}


def test_the_head_is_learned_and_travels_through_merge_and_search(base: Path, trained: Path, tmp_path: Path) -> None:
    data = write_labels(tmp_path, "test.de.tsv")
    alone = evaluate(evaluated(base, trained, data))
    assert alone.scores["de"].value == 1.0
    manifest = json.loads((trained / "adaptermix.json").read_text())
    reader = manifest["task"]["reader"]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["task_type"] in ("FEATURE_EXTRACTION", "CAUSAL_LM")  # PEFT has no class with this head
    assert "head" in config["modules_to_save"]
    blocks = {int(path.split(".layer")[1].split(".")[1]) for path in open_adapter(trained).modules}
    assert blocks == set(range(2 if reader["layers"] == "2" else 4))

    align = AlignSettings(**values(base, tmp_path, pairs=write_pairs(tmp_path), out=str(tmp_path / "align")))
    train_align(align)
    merge([trained, tmp_path / "align"], weights=[1.0, 0.0], out=tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "adaptermix.json").read_text())["task"]["reader"] == reader
    merged, head = load_adapter(tmp_path / "merged"), load_adapter(trained)
    assert all(torch.equal(merged.saved[key], tensor) for key, tensor in head.saved.items())
    assert evaluate(evaluated(base, tmp_path / "merged", data)).answers == alone.answers

    asked = SearchSettings(
        **searched(base, trained, tmp_path / "align"), dev=[data], grid=[0.5, 1.0], out=str(tmp_path / "found")
    )
    search(asked)
    assert json.loads((tmp_path / "found" / "adaptermix.json").read_text())["task"]["reader"] == reader


def test_training_goes_on_from_an_adapter_with_such_a_head(base: Path, trained: Path, tmp_path: Path) -> None:
    more = settings_for(base, tmp_path, steps=1, head="auto", start_from=str(trained), learning_rate=1e-9)
    train_task(more)
    before, after = load_adapter(trained), load_adapter(tmp_path / "out")
    assert before.saved.keys() == after.saved.keys()
    assert all(torch.allclose(before.saved[key], after.saved[key], atol=1e-6) for key in before.saved)
    other = settings_for(base, tmp_path, steps=1, start_from=str(trained), head_layers="last+1", overwrite=True)
    with refuses("start-from.head-option"):
        train_task(other)


def test_heads_that_read_other_states_are_not_averaged(base: Path, tmp_path: Path) -> None:
    for name, reader in (("one", {"head_layers": "last+1"}), ("two", {"head_layers": "last+2"})):
        train_task(settings_for(base, tmp_path, steps=1, out=str(tmp_path / name), **reader))
    with refuses("adapters.head-labels"):
        merge([tmp_path / "one", tmp_path / "two"], weights=[0.5, 0.5], saved="average", out=tmp_path / "merged")
    asked = SearchSettings(
        **searched(base, tmp_path / "one", tmp_path / "two"),
        dev=[write_labels(tmp_path, "dev.de.tsv")],
        grid=[0.5],
        out=str(tmp_path / "found"),
    )
    with refuses("head.readers"):
        search(asked)


@pytest.mark.parametrize("reader", ["last+2", "2"])
def test_joint_training_has_such_a_head(base: Path, reader: str, tmp_path: Path) -> None:
    data = {"task": "classify", "train": [write_labels(tmp_path)], "pairs": write_pairs(tmp_path), "head": "classes"}
    train_joint(JointSettings(**values(base, tmp_path, head_layers=reader, steps=2, **data)))
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert manifest["task"]["reader"]["layers"] == reader


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"head": "none", "head_layers": "last"}, "head.reader-option"),
        ({"aggregate": "se"}, "head.reader-option"),
        ({"head_layers": "last", "gate": "local"}, "head.reader-option"),
        ({"head_layers": "last+2", "aggregate": "add", "gate_ratio": 4}, "head.reader-option"),
        ({"head_layers": "2", "head_norm": "none"}, "head.reader-option"),
        ({"head_layers": "first"}, "option.head-layers"),
        ({"head_layers": "-1"}, "option.head-layers"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(
    encoder: Path, options: dict[str, object], code: str, tmp_path: Path
) -> None:
    with refuses(code):
        settings_for(encoder, tmp_path, **options)


def test_the_learned_mean_names_two_blocks(base: Path, tmp_path: Path) -> None:
    notes = Notes()
    train_task(settings_for(base, tmp_path, steps=5, head_layers="last+search"), watch=notes)
    (said,) = [note for note in notes.said if "last+search" in note]
    weights = load_adapter(tmp_path / "out").saved["base_model.model.reader.mix"].softmax(0)
    lower = sorted(range(4), key=lambda block: -float(weights[1 + block]))[:2]
    assert f"blocks {lower[0]} ({weights[1 + lower[0]]:.2f}) and {lower[1]} ({weights[1 + lower[1]]:.2f})" in said


def test_a_generated_answer_has_no_reader(causal: Path, tmp_path: Path) -> None:
    asked = TaskSettings(
        **values(causal, tmp_path, task="classify", train=[write_labels(tmp_path)], head_layers="last", dry_run=True)
    )
    with refuses("head.reader-option"):
        train_task(asked)
