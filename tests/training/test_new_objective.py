"""An objective from outside the package: one class, which the runner trains, resumes, plans and writes."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from adaptermix import load_adapter
from adaptermix.options import TrainingSettings
from adaptermix.options.fields import Files
from adaptermix.options.roles import TRAINING, Reads
from adaptermix.tasks.data.report import describe
from adaptermix.training.runner import Objective, run_training
from adaptermix.training.sampler import Sampler
from adaptermix.training.trainer import Loss, Together


class TextSettings(TrainingSettings):
    texts: Annotated[Files, Reads(TRAINING, "texts")]


class TextObjective(Objective[TextSettings]):
    """Next-token prediction on the lines of a file."""

    command = "train-text"
    lines: list[str]

    def read(self) -> None:
        self.lines = [line for path in self.run.settings.texts for line in Path(path).read_text().splitlines()]
        self.report = describe([("en", line) for line in self.lines], [])

    def rows(self) -> int:
        return len(self.lines)

    def entries(self) -> dict[str, Any]:
        hashes = [sha256(Path(path).read_bytes()).hexdigest() for path in self.run.settings.texts]
        return {"data": [{"sha256": value} for value in hashes], "rows": self.report.document()}

    def loss(self, together: Together | None = None) -> Loss:
        base, settings = self.run.base, self.run.settings
        sampler = Sampler(groups=[range(len(self.lines))], batch_size=settings.batch_size, seed=settings.seed)

        def loss_of(number: int) -> tuple[torch.Tensor, int]:
            ids = [base.tokenizer(self.lines[row])["input_ids"] for row in sampler.batch(number)]
            losses = [base.model(tokens, labels=tokens).loss for tokens in (torch.tensor([row]) for row in ids)]
            return torch.stack(losses).mean() / settings.accumulate, sum(map(len, ids))

        return loss_of


def settings_for(base: Path, folder: Path, **more: Any) -> TextSettings:
    (folder / "lines.txt").write_text("the red house\nthe blue house\n")
    values = {"base": str(base), "texts": [str(folder / "lines.txt")], "out": str(folder / "out"), "steps": 8}
    return TextSettings(**values | {"device": "cpu", "batch_size": 2, "learning_rate": 1e-2, "dropout": 0.0} | more)


def test_an_objective_needs_one_class(causal: Path, tmp_path: Path) -> None:
    report = run_training(TextObjective, settings_for(causal, tmp_path))
    losses = [entry["loss"] for entry in report.history]
    assert losses[-1] < losses[0] - 0.1
    manifest = load_adapter(report.out).meta.manifest
    assert manifest["kind"] == "train-text"
    assert manifest["plan"]["texts"] == [str(tmp_path / "lines.txt")]
    assert json.loads((report.out / "adapter_config.json").read_text())["r"] == 8


def test_a_new_objective_has_a_dry_run_and_resumes(causal: Path, tmp_path: Path) -> None:
    plan = run_training(TextObjective, settings_for(causal, tmp_path, dry_run=True)).document()
    assert plan["dry_run"]
    assert plan["steps"] == 8
    assert not (tmp_path / "out").exists()

    class Failing:
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    settings = settings_for(causal, tmp_path, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        run_training(TextObjective, settings, callbacks=[Failing()])
    resumed = run_training(TextObjective, settings.model_copy(update={"resume": True}))
    whole = run_training(TextObjective, settings.model_copy(update={"out": str(tmp_path / "whole")}))
    weights = [(report.out / "adapter_model.safetensors").read_bytes() for report in (resumed, whole)]
    assert weights[0] == weights[1]
