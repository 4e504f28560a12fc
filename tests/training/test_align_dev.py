"""Dev pairs of alignment training: their loss, early stopping, the step that is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix import AlignSettings, load_adapter, train_align
from adaptermix.merging.attach import Attachment
from adaptermix.models.base import backbone, load_base
from adaptermix.progress import Look, Silent
from adaptermix.tasks.data import read_pairs
from adaptermix.training import align
from adaptermix.training.early_stopping import DevLosses

from ..refusals import refuses
from .data import Notes, write_pairs
from .test_joint import values


def settings_for(base: Path, folder: Path, **more: Any) -> AlignSettings:
    pairs = write_pairs(folder)
    own: dict[str, Any] = {"pairs": pairs[:1], "dev_pairs": pairs[1:], "batch_size": 4, "steps": 6, "evaluate_every": 2}
    own["objective"] = "contrastive"
    return AlignSettings(**values(base, folder, **own | more))


def by_hand(base: Path, adapter: Path, settings: AlignSettings, layer: int) -> float:
    """The loss of the dev pairs, all in one batch, in float64 from whole forward passes of one sentence each."""
    loaded = load_base(str(base), dtype="float32", device="cpu")
    Attachment(loaded.model, [load_adapter(adapter)])
    loaded.model.double().eval()
    pairs, _ = read_pairs(settings.dev_pairs)

    def vector(text: str) -> torch.Tensor:
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        states = backbone(loaded)(ids, output_hidden_states=True).hidden_states[layer][0]
        return torch.nn.functional.normalize(states.mean(0), dim=0)

    with torch.no_grad():
        x, y = (torch.stack([vector(getattr(pair, side)) for pair in pairs]) for side in ("source", "target"))
    scores = (x @ y.T / settings.temperature).log_softmax(1)
    return -float(scores.diagonal().mean())


def test_the_dev_loss_is_that_of_the_adapter_written(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, norm_budget=None)
    report = train_align(settings)
    looks = {entry["step"]: entry["dev_loss"] for entry in report.history if "dev_loss" in entry}
    assert list(looks) == [2, 4, 6]
    assert looks[6] == pytest.approx(by_hand(causal, tmp_path / "out", settings, 2), rel=1e-4)
    document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert [file["name"] for file in document["dev"]] == ["fr-en.tsv"]
    assert document["languages"] == {"aligned": ["de", "en"]}


def test_patience_keeps_the_step_of_the_least_dev_loss(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.0])
    monkeypatch.setattr(DevLosses, "__call__", lambda _self: {"dev_loss": next(losses)})
    report = train_align(settings_for(causal, tmp_path, steps=10, patience=2, evaluate_every=1))
    assert (report.kept, len([entry for entry in report.history if "seconds" in entry])) == (2, 4)
    monkeypatch.undo()
    short = settings_for(causal, tmp_path, steps=10, evaluate_every=None, dev_pairs=[], out=str(tmp_path / "short"))
    seen: list[dict[str, torch.Tensor]] = []
    kept = {key: update.dense() for key, update in load_adapter(tmp_path / "out").updates.items()}
    monkeypatch.setattr(align.AlignLoss, "__call__", _stop_after(align.AlignLoss.__call__, 2, seen))
    with pytest.raises(KeyboardInterrupt):
        train_align(short)
    assert len(seen) == 1
    assert kept.keys() == seen[0].keys()
    assert all(torch.allclose(kept[key], delta, atol=1e-6) for key, delta in seen[0].items())


def _stop_after(call: Any, steps: int, seen: list[dict[str, torch.Tensor]]) -> Any:
    """A loss that, when asked for one more batch, notes what the LoRA adds by then and ends the run."""

    def stopped(self: Any, number: int) -> Any:
        if number < steps:
            return call(self, number)
        modules = self._model.named_modules()
        layers = {name: module for name, module in modules if hasattr(module, "get_delta_weight") and module.lora_A}
        seen.append({name: module.get_delta_weight("default").detach() for name, module in layers.items()})
        raise KeyboardInterrupt

    return stopped


def test_dev_pairs_are_checked_as_training_pairs_are(causal: Path, tmp_path: Path) -> None:
    with refuses("train.no-dev: dev-pairs"):
        settings_for(causal, tmp_path, dev_pairs=[])
    (tmp_path / "it-en.tsv").write_text("uno\tone\n")
    with refuses("align.too-few-pairs: dev pairs"):
        train_align(settings_for(causal, tmp_path, dev_pairs=[str(tmp_path / "it-en.tsv")]))
    notes = Notes()
    train_align(settings_for(causal, tmp_path, dev_pairs=write_pairs(tmp_path)[:1]), watch=notes)
    assert any(note.startswith("warning: 12 of 12 dev pairs are also in the training pairs") for note in notes.said)


def test_the_accuracy_of_dev_pairs_is_of_no_temperature(causal: Path, tmp_path: Path) -> None:
    rows = [("the red", "a red"), ("the blue", "a blue"), ("green", "grey"), ("un", "a red"), ("x", "the white")]
    (tmp_path / "it-en.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in rows))
    settings, looks = settings_for(causal, tmp_path, batch_size=5), []
    for temperature in (0.05, 5.0):
        at = settings.model_copy(update={"temperature": temperature})
        base = load_base(str(causal), dtype="float32", device="cpu")
        objective = align.AlignLoss(base, read_pairs([str(tmp_path / "it-en.tsv")])[0], at, layer=2)
        looks.append(DevLosses(base, {"dev_loss": objective.of_rows}, at)())
    assert looks[0]["dev_loss"] != looks[1]["dev_loss"]
    assert 0 < looks[0]["dev_accuracy"] == looks[1]["dev_accuracy"] < 1
    assert looks[0]["dev_accuracy"] == _accuracy(objective, range(5))


def _accuracy(objective: Any, rows: range) -> float:
    """Both directions, one pair after the other."""
    source, target, _ = objective._sides(rows)
    found = 0
    for i in rows:
        there = max(rows, key=lambda j: float(torch.cosine_similarity(source[i], target[j], dim=0)))
        back = max(rows, key=lambda j: float(torch.cosine_similarity(source[j], target[i], dim=0)))
        found += (objective._targets[there] == objective._targets[i]) + (
            objective._targets[back] == objective._targets[i]
        )
    return found / 2 / len(rows)


class Looks(Silent):
    """Keeps what it is told of, and may end the run at a step."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.seen: list[Look] = []
        self._ends_at = ends_at

    def look(self, look: Look) -> None:
        self.seen.append(look)
        if look.step == self._ends_at:
            raise ZeroDivisionError


def test_looks_are_told_and_can_end_the_training_and_a_resumed_one_tells_all(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, checkpoint_every=1)
    whole, ended, rest = Looks(), Looks(ends_at=4), Looks()
    report = train_align(settings.model_copy(update={"out": str(tmp_path / "whole")}), watch=whole)
    logged = [(entry["step"], entry["dev_accuracy"]) for entry in report.history if "dev_accuracy" in entry]
    assert [(look.step, look.value) for look in whole.seen] == logged
    assert {(look.measure, look.higher) for look in whole.seen} == {("dev_accuracy", True)}
    with pytest.raises(ZeroDivisionError):
        train_align(settings, watch=ended)
    assert not (tmp_path / "out").exists()
    train_align(settings.model_copy(update={"resume": True}), watch=rest)
    assert rest.seen == whole.seen
