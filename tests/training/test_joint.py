"""Joint training: whose turn it is, what each objective sees, what it equals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix import AlignSettings, JointSettings, TaskSettings, load_adapter, train_align, train_joint, train_task
from adaptermix.cli import main
from adaptermix.models.base import load_base
from adaptermix.models.blocks import first_blocks, keep_blocks
from adaptermix.models.eval_mode import evaluating, loras_off
from adaptermix.tasks.data import read_pairs
from adaptermix.training.align import AlignLoss
from adaptermix.training.early_stopping import DevLosses, standing
from adaptermix.training.joint import joint_steps, turn
from adaptermix.training.lora import inject
from adaptermix.training.pairs import PairsLoss
from adaptermix.training.trainer import BatchLoss

from ..refusals import refuses
from .data import write_pairs, write_slots


def values(base: Path, folder: Path, **more: object) -> dict[str, Any]:
    return {
        "base": str(base),
        "out": str(folder / "out"),
        "dtype": "float32",
        "device": "cpu",
        "steps": 4,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "rank": 4,
        "dropout": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
    } | more


def settings_for(base: Path, folder: Path, **more: object) -> JointSettings:
    own: dict[str, object] = {"task": "slots", "train": [write_slots(folder)], "pairs": write_pairs(folder)}
    return JointSettings(**values(base, folder, **(own | more)))


@given(st.integers(0, 60), st.sampled_from([1, 2, 3, 4]))
def test_every_batch_of_an_objective_comes_once_and_in_order(count: int, accumulate: int) -> None:
    for alternate in ("batch", "step", "sum"):
        turns = [turn(alternate, number, accumulate) for number in range(count)]
        for name in ("task", "align"):
            assert [own for names, own in turns if name in names] == list(range(sum(name in n for n, _ in turns)))
        assert all(len(names) == (2 if alternate == "sum" else 1) for names, _ in turns)


def test_the_published_unit_is_the_batch_and_the_papers_the_step() -> None:
    """With four accumulated batches a step of the release holds two of each objective."""
    released = [turn("batch", number, 4)[0][0] for number in range(8)]
    written = [turn("step", number, 4)[0][0] for number in range(8)]
    assert released == ["task", "align"] * 4
    assert written == ["task"] * 4 + ["align"] * 4


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"alternate": "step"}, [{"task": 12}, {"align": 12}, {"task": 12}, {"align": 12}]),
        ({"alternate": "batch"}, [{"task": 6, "align": 6}] * 4),
        ({"alternate": "sum"}, [{"task": 12, "align": 12}] * 4),
    ],
)
def test_the_log_tells_the_rows_of_each_objective(
    more: dict[str, str], expected: list[dict[str, int]], causal: Path, tmp_path: Path
) -> None:
    report = train_joint(settings_for(causal, tmp_path, accumulate=2, **more))
    rows = [{name: part["rows"] for name, part in entry["objectives"].items()} for entry in report.history]
    assert rows == expected
    assert [entry["rows"] for entry in report.history] == [sum(part.values()) for part in expected]
    assert all(entry["loss"] > 0 for entry in report.history)


def test_a_summed_step_without_alignment_is_task_training(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each command draws its own first factors
    monkeypatch.setattr("adaptermix.training.runner.first_draw", lambda seed, _kind: seed)
    train_joint(settings_for(causal, tmp_path, alternate="sum", align_weight=0.0))
    train_task(
        TaskSettings(**values(causal, tmp_path, task="slots", train=[write_slots(tmp_path)], out=str(tmp_path / "t")))
    )
    joint, task = load_adapter(tmp_path / "out"), load_adapter(tmp_path / "t")
    for module, update in task.updates.items():
        torch.testing.assert_close(joint.updates[module].dense(), update.dense(), rtol=1e-4, atol=1e-6)


def test_an_alignment_step_has_the_loss_of_alignment_training(causal: Path, tmp_path: Path) -> None:
    """The first step is the task's, and its learning rate is zero, so the factors are still those of the start."""
    joint = settings_for(causal, tmp_path, steps=2, schedule="linear", warmup=0.5, learning_rate=1e-2)
    report = train_joint(joint)
    own = {"pairs": joint.pairs, "objective": joint.objective, "out": str(tmp_path / "a"), "steps": 1}
    align = AlignSettings(**values(causal, tmp_path, **own))
    alone = train_align(align)
    # both have seen the same pairs with the same factors
    assert report.history[1]["objectives"]["align"]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-5)


def test_the_middle_of_a_whole_model_is_that_of_one_cut_there(any_causal: Path, tmp_path: Path) -> None:
    settings = AlignSettings(**values(any_causal, tmp_path, pairs=write_pairs(tmp_path)))
    pairs, _ = read_pairs(settings.pairs)
    whole, cut = (load_base(str(any_causal), dtype="float32", device="cpu") for _ in range(2))
    keep_blocks(cut.model, 2)
    tokens = torch.arange(3, 15)[None]
    before = whole.model(tokens).logits
    found = AlignLoss(whole, pairs, settings, layer=2)(0).loss
    torch.testing.assert_close(found, AlignLoss(cut, pairs, settings)(0).loss)
    torch.testing.assert_close(whole.model.eval()(tokens).logits, before)
    with pytest.raises(RuntimeError), first_blocks(whole.model, 1):
        raise RuntimeError
    torch.testing.assert_close(whole.model(tokens).logits, before)


def test_the_fixed_teacher_is_the_base(causal: Path, tmp_path: Path) -> None:
    settings = AlignSettings(**values(causal, tmp_path, pairs=write_pairs(tmp_path), anchor="base"))
    pairs, _ = read_pairs(settings.pairs)
    base = load_base(str(causal), dtype="float32", device="cpu")
    keep_blocks(base.model, 2)
    with torch.no_grad():
        source, target, _ = AlignLoss(base, pairs, settings)._sides([0, 1, 2])
    inject(base.model, settings, seed=0)
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    objective = AlignLoss(base, pairs, settings)
    moved, fixed, kept = objective._sides([0, 1, 2])
    assert kept is None
    torch.testing.assert_close(fixed, target)
    assert not torch.allclose(moved, source)
    assert not fixed.requires_grad
    assert moved.requires_grad
    with loras_off(base.model):
        pass
    objective(0).loss.backward()
    assert all(p.grad is not None for name, p in base.model.named_parameters() if "lora_" in name)


def test_passed_over_rows_are_those_of_the_release(causal: Path, tmp_path: Path) -> None:
    """A row carries a task half and a pair; the half whose turn it is not is not seen again in that pass."""
    plain = settings_for(causal, tmp_path, steps=None, epochs=2, batch_size=2, alternate="batch")
    assert joint_steps(6, plain) == 12
    assert joint_steps(6, plain.model_copy(update={"discard": True})) == 6
    assert joint_steps(6, plain.model_copy(update={"alternate": "sum"})) == 6
    assert joint_steps(6, plain.model_copy(update={"steps": 5})) == 5


def test_what_is_written(causal: Path, tmp_path: Path) -> None:
    train_joint(settings_for(causal, tmp_path, dev=[write_slots(tmp_path, "dev.en.jsonl")], evaluate_every=2))
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert manifest["languages"] == {"supervised": ["en"], "aligned": ["de", "en", "fr"]}
    assert manifest["objective"]["layer"] == 2
    assert manifest["task"]["name"] == "slots"
    assert [entry["name"] for entry in manifest["data"]] == ["train.en.jsonl", "de-en.tsv", "fr-en.tsv"]
    blocks = {part for m in load_adapter(tmp_path / "out").updates for part in m.split(".") if part.isdigit()}
    assert blocks == {"0", "1", "2", "3"}
    assert "task and for alignment" in (tmp_path / "out" / "README.md").read_text()


def test_one_objective_does_not_decide_for_the_other_unless_asked(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = [write_slots(tmp_path, "dev.en.jsonl")]
    looks = iter(zip([1.0, 2.0, 3.0, 4.0] * 3, [9.0, 5.0, 2.0, 1.5] * 3, strict=True))

    def measure(_self: DevLosses) -> dict[str, float]:
        return dict(zip(("dev_task_loss", "dev_align_loss"), next(looks), strict=True))

    monkeypatch.setattr(DevLosses, "__call__", measure)
    kept = {}
    for select in (None, "align", "sum"):
        own: dict[str, Any] = {"select": select} if select else {}
        settings = settings_for(
            causal, tmp_path, dev=dev, dev_pairs=write_pairs(tmp_path), evaluate_every=1, patience=9, **own
        )
        kept[select] = train_joint(settings.model_copy(update={"out": str(tmp_path / str(select))})).kept
    assert kept == {None: 1, "align": 4, "sum": 3}


@pytest.mark.parametrize(
    ("given", "more", "says"),
    [
        ("dev", {"select": "align", "patience": 2}, "joint.select-pairs: align"),
        ("dev", {"select": "sum", "patience": 2}, "joint.select-pairs: sum"),
        ("dev_pairs", {"patience": 2}, "joint.select-dev: task"),
        ("dev_pairs", {"select": "sum", "patience": 2}, "joint.select-dev: sum"),
        ("dev_pairs", {"select": "align"}, "joint.select-patience"),
        ("", {"patience": 2}, "train.no-dev"),
        ("", {"evaluate_every": 2}, "train.no-dev"),
    ],
)
def test_a_choice_by_what_is_not_measured_is_refused(
    given: str, more: dict[str, object], says: str, causal: Path, tmp_path: Path
) -> None:
    own: dict[str, object] = {given: ["x"]} if given else {}
    with refuses(says):
        settings_for(causal, tmp_path, **own, **more)


@pytest.mark.parametrize("patience", [None, 9])
def test_dev_pairs_are_measured_without_dev_files_too(patience: int | None, causal: Path, tmp_path: Path) -> None:
    chosen: dict[str, object] = {"patience": patience, "select": "align"} if patience else {}
    report = train_joint(settings_for(causal, tmp_path, dev_pairs=write_pairs(tmp_path), evaluate_every=2, **chosen))
    looks = {entry["step"]: set(entry) for entry in report.history if "dev_align_loss" in entry}
    assert looks == {step: {"step", "dev_align_loss", "dev_align_accuracy"} for step in (2, 4)}
    assert (report.kept in looks) == bool(patience)


def test_dev_pairs_without_negatives_are_refused(causal: Path, tmp_path: Path) -> None:
    (tmp_path / "sv-en.tsv").write_text("gul\tyellow\n" * 3)
    for dry_run in (True, False):
        with refuses("align.too-few-pairs: dev pairs.*1"):
            train_joint(settings_for(causal, tmp_path, dev_pairs=[str(tmp_path / "sv-en.tsv")], dry_run=dry_run))


def test_no_dev_pair_is_measured_alone(causal: Path, tmp_path: Path) -> None:
    """A pair without another has a loss of 0, so seven pairs in batches of six are one batch."""
    settings = settings_for(causal, tmp_path)
    base = load_base(str(causal), dtype="float32", device="cpu")
    for count, parts in ((7, [7]), (6, [6]), (8, [6, 2]), (13, [6, 7]), (1, [1])):
        pairs = read_pairs(settings.pairs)[0][:count]
        loss = AlignLoss(base, pairs, settings, layer=2)
        seen: list[int] = []

        def look(rows: Sequence[int], loss: AlignLoss = loss, seen: list[int] = seen) -> BatchLoss:
            seen.append(len(rows))
            return loss._of_rows(rows)

        found = DevLosses(base, {"dev": PairsLoss(look, [1] * count)}, settings)()["dev"]
        assert seen == parts
        edges = [sum(parts[:n]) for n in range(len(parts) + 1)]
        with torch.no_grad(), evaluating(base.model):
            sums = [float(loss._of_rows(range(one, two)).loss) * (two - one) for one, two in pairwise(edges)]
        assert found == pytest.approx(sum(sums) / count, rel=1e-5)


def test_the_standing_is_read_from_the_log() -> None:
    log = [{"loss": 1.0}, {"dev_loss": 3.0}, {"dev_loss": 2.0}, {"loss": 0.5}, {"dev_loss": 2.5}, {"dev_loss": 2.0}]
    assert standing(log, "dev_loss") == (2.0, 2)
    assert standing(log[:3], "dev_loss") == (2.0, 0)
    assert standing([], "dev_loss") == (float("inf"), 0)


def test_a_dry_run_counts_rows_dev_rows_and_pairs(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots = write_slots(tmp_path)
    options = ["--task", "slots", "--train", slots, "--dev", slots, "--pairs", *write_pairs(tmp_path), "--dry-run"]
    with pytest.raises(SystemExit):
        main(["train-joint", "--base", str(causal), "--out", str(tmp_path / "out"), *options, "--json"])
    out = capsys.readouterr()
    assert "rows: en 6; 0 repeated; 6 dev rows; 15 pairs" in out.err
    assert json.loads(out.out)["pairs"] == 15
    assert not (tmp_path / "out").exists()
