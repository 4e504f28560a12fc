"""The keeper: what it measures, that it is measured once, that it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix import AlignSettings, JointSettings, train_align, train_joint
from adaptermix.cli import main
from adaptermix.models.base import BaseModel, backbone, load_base
from adaptermix.tasks.data import Pair, read_pairs
from adaptermix.training.align import AlignLoss
from adaptermix.training.lora import inject
from adaptermix.training.losses import keeper_loss

from .data import write_pairs, write_slots
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROWS = [0, 3, 13]


def settings_for(base: Path, folder: Path, **more: object) -> AlignSettings:
    return AlignSettings(**values(base, folder, **({"pairs": write_pairs(folder)} | more)))


def moved_base(settings: AlignSettings) -> BaseModel:
    """A base in float64 whose LoRA does something."""
    base = load_base(settings.base, dtype="float32", device="cpu")
    inject(base.model, settings, seed=0)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    base.model.double()
    return base


def by_loop(settings: AlignSettings, pairs: list[Pair], base: BaseModel, layer: int) -> float:
    """The keeper's loss token by token, from whole forward passes of one sentence each, in float64."""
    plain = load_base(settings.base, dtype="float32", device="cpu")
    plain.model.double()
    shares = []
    for row in ROWS:
        ids = plain.tokenizer(pairs[row].target)["input_ids"]
        theirs, ours = (
            backbone(one)(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
            for one in (plain, base)
        )
        for place, token in enumerate(ids):
            if settings.exclude_bos and place == 0 and token in plain.tokenizer.all_special_ids:
                continue
            moved = ours[place] - theirs[place]
            shares.append(float(moved @ moved) / float(theirs[place] @ theirs[place]))
    return sum(shares) / len(shares)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_it_is_the_mean_share_of_squared_norms(tokens: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, base = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    rows = [(one.double(), other.double()) for one, other in zip(ours, base, strict=True)]
    shares = [float((one - other) @ (one - other)) / float(other @ other) for one, other in rows]
    assert float(keeper_loss(ours, base)) == pytest.approx(sum(shares) / tokens, rel=1e-5)
    assert float(keeper_loss(base, base)) == 0.0
    assert float(keeper_loss(torch.zeros_like(base), base)) == pytest.approx(1.0)


def test_it_is_computed_in_float32_and_nothing_reaches_the_base() -> None:
    ours, base = (torch.full((2, 300), value).bfloat16().requires_grad_() for value in (1.0, 2.0))
    found = keeper_loss(ours, base)
    assert found.dtype == torch.float32
    assert float(found.detach()) == 0.25
    found.backward()
    assert ours.grad is not None
    assert base.grad is None


@torch.no_grad()
@pytest.mark.parametrize("anchor", ["pair", "base"])
@pytest.mark.parametrize(("kind", "exclude_bos"), [("causal", False), ("encoder", False), ("encoder", True)])
def test_it_looks_at_the_tokens_of_the_english_side_at_the_aligned_layer(
    kind: str, exclude_bos: bool, anchor: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = settings_for(
        request.getfixturevalue(kind), tmp_path, keeper=0.7, anchor=anchor, exclude_bos=exclude_bos, layer=3
    )
    pairs, _ = read_pairs(settings.pairs)
    base = moved_base(settings)
    objective = AlignLoss(base, pairs, settings, layer=3)
    base.model.eval()  # an encoder has dropout of its own
    found = objective.of_rows(ROWS)
    kept = by_loop(settings, pairs, base, 3)
    assert kept > 0.01
    assert float(found.parts["keeper"][0]) == pytest.approx(kept, rel=1e-4)
    without = AlignLoss(base, pairs, settings.model_copy(update={"keeper": 0.0}), layer=3)
    base.model.eval()
    alone = without.of_rows(ROWS)
    assert alone.parts == {}
    assert float(found.parts["align"][0]) == pytest.approx(float(alone.loss), rel=1e-5)
    assert float(found.loss) == pytest.approx(float(alone.loss) + 0.7 * kept, rel=1e-4)


def test_the_base_is_run_once_for_the_teacher_and_the_keeper(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, keeper=1.0, anchor="base")
    base = moved_base(settings)
    seen: list[int] = []
    base.model.get_input_embeddings().register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    objective = AlignLoss(base, read_pairs(settings.pairs)[0], settings, layer=2)
    seen.clear()  # the base's sentences were measured
    objective.of_rows(ROWS)
    # both sides of the model in training, the targets of the base
    assert sum(seen) == 3 * len(ROWS)


def test_the_keeper_moves_targets_that_get_no_other_gradient(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, keeper=1.0, stop_gradient=True)
    base = moved_base(settings)
    found = AlignLoss(base, read_pairs(settings.pairs)[0], settings, layer=2).of_rows(ROWS)
    for loss, _ in found.parts.values():
        gradients = torch.autograd.grad(
            loss, [p for p in base.model.parameters() if p.requires_grad], retain_graph=True, allow_unused=True
        )
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_states_stay_nearer_to_the_base_with_it(causal: Path, tmp_path: Path) -> None:
    moved = {}
    for weight in (1e-6, 100.0):
        out = tmp_path / str(weight)
        report = train_align(settings_for(causal, tmp_path, keeper=weight, steps=25, out=str(out)))
        losses = [entry["objectives"]["keeper"]["loss"] for entry in report.history]
        assert losses[0] == pytest.approx(0.0, abs=1e-9)
        moved[weight] = losses[-1]
    assert moved[100.0] < 0.3 * moved[1e-6]


def test_joint_training_logs_it_beside_task_and_alignment(causal: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"task": "slots", "train": [write_slots(tmp_path)], "pairs": write_pairs(tmp_path)}
    settings = JointSettings(**values(causal, tmp_path, **own, keeper=2.0, align_weight=0.5, accumulate=1))
    report = train_joint(settings)
    assert [list(entry["objectives"]) for entry in report.history] == [["task"], ["align", "keeper"]] * 2
    last = report.history[-1]
    parts = {name: part["loss"] for name, part in last["objectives"].items()}
    assert last["loss"] == pytest.approx(0.5 * (parts["align"] + 2.0 * parts["keeper"]), rel=1e-5)


def test_on_the_command_line(causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train-align --base {causal} --pairs {' '.join(write_pairs(tmp_path))} --out {tmp_path}/a --steps 2 --json"
    with pytest.raises(SystemExit) as caught:
        main([*line.split(), "--batch-size", "4", "--device", "cpu", "--keeper", "0.5"])
    assert not caught.value.code
    assert set(json.loads(capsys.readouterr().out)["objectives"]) == {"align", "keeper"}
    assert json.loads((tmp_path / "a" / "adaptermix.json").read_text())["plan"]["keeper"] == 0.5


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "much"])
def test_other_weights_are_refused_before_a_model_is_loaded(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train-align", "--base", "none", "--pairs", "none", "--out", str(tmp_path / "a"), "--keeper", value])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "--keeper" in message
    assert message.count("\n") == 1
