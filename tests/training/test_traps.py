"""Traps on the way to the mid-align paper that no other test of a switch names: what each switch is, and is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix import AlignSettings, JointSettings
from adaptermix.models.base import BaseModel, backbone, load_base
from adaptermix.tasks.data import Pair, read_pairs
from adaptermix.training.align import AlignLoss
from adaptermix.training.early_stopping import DevLosses
from adaptermix.training.joint import JointLoss
from adaptermix.training.layer_states import MiddleStates
from adaptermix.training.lora import factors, inject
from adaptermix.training.losses import contrastive_loss
from adaptermix.training.trainer import BatchLoss

from .data import write_pairs, write_slots
from .test_joint import values

ROWS = [0, 3, 13]
SIDES = ("source", "target")


def settings_for(base: Path, folder: Path, **more: object) -> AlignSettings:
    return AlignSettings(**values(base, folder, **({"pairs": write_pairs(folder)} | more)))


def moved_base(settings: AlignSettings | JointSettings) -> BaseModel:
    """A base whose LoRA does something."""
    base = load_base(settings.base, dtype="float32", device="cpu")
    inject(base.model, settings, seed=0)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return base


def test_stopping_the_gradient_is_not_the_choice_of_a_direction(causal: Path, tmp_path: Path) -> None:
    """The release calls it unidirectional; the value is the same, and the gradient is that of fixed targets."""
    settings = settings_for(causal, tmp_path)
    base = moved_base(settings)
    pairs, _ = read_pairs(settings.pairs)
    live = list(factors(base.model).values())
    losses, slopes = {}, {}
    for name, more in (("plain", {}), ("stopped", {"stop_gradient": True}), ("both", {"symmetric": True})):
        loss = AlignLoss(base, pairs, settings.model_copy(update=more), layer=2).of_rows(ROWS).loss
        losses[name] = float(loss.detach())
        slopes[name] = torch.autograd.grad(loss, live, allow_unused=True)
    assert losses["stopped"] == losses["plain"]
    assert losses["stopped"] != pytest.approx(losses["both"], rel=1e-4)
    states = MiddleStates(base, 2)
    source, target = ([base.tokenizer(getattr(pairs[r], side))["input_ids"] for r in ROWS] for side in SIDES)
    with torch.no_grad():
        fixed = states.pooled(target)
    expected = torch.autograd.grad(contrastive_loss(states.pooled(source), fixed), live, allow_unused=True)
    for found, plain, wanted in zip(slopes["stopped"], slopes["plain"], expected, strict=True):
        if wanted is None:
            assert found is None
            continue
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(plain, wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
@pytest.mark.parametrize("layer", [1, 3])
def test_the_first_token_is_the_vector_if_asked(kind: str, layer: int, request: pytest.FixtureRequest) -> None:
    base = load_base(str(request.getfixturevalue(kind)), dtype="float32", device="cpu")
    encoded = base.tokenizer(["some words", "x", "of middle"])["input_ids"]
    found = MiddleStates(base, layer, pooling="bos").pooled(encoded)
    for row, ids in enumerate(encoded):
        states = backbone(base)(torch.tensor([ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(found[row], states[layer][0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"anchor": "base"}, {"anchor": "base", "keeper": 0.5}, {"keeper": 0.5}])
def test_a_dev_loss_has_no_dropout_whatever_the_teacher(more: dict[str, Any], causal: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"task": "slots", "train": [write_slots(tmp_path)], "pairs": write_pairs(tmp_path)}
    settings = JointSettings(**values(causal, tmp_path, **own, **more))
    base = moved_base(settings.model_copy(update={"dropout": 0.5}))
    pairs, _ = read_pairs(settings.pairs)
    judge = AlignLoss(base, pairs, settings, layer=2)
    found = [DevLosses(base, {"dev": judge.of_rows}, settings)()["dev"] for _ in range(2)]
    assert base.model.training
    without = moved_base(settings)
    expected = AlignLoss(without, pairs, settings, layer=2)
    total = kept = tokens = 0.0
    for rows in (range(6), range(6, 12), range(12, 15)):
        one = expected.of_rows(rows)
        total += float((one.parts["align"][0] if one.parts else one.loss).detach()) * len(rows)
        # the keeper's loss is a mean over tokens of targets, of which the batches have unlike numbers
        count = sum(len(expected._target_ids[row]) for row in rows)
        kept, tokens = kept + (float(one.parts["keeper"][0].detach()) if one.parts else 0.0) * count, tokens + count
    assert found[0] == found[1] == pytest.approx(total / 15 + settings.keeper * kept / tokens, rel=1e-5)


@pytest.mark.parametrize(
    ("discard", "task", "align"), [(True, [0, 2, 4, 6], [1, 3, 5]), (False, [0, 1, 2, 3], [0, 1, 2])]
)
def test_turns_run_on_over_the_end_of_a_pass(
    discard: bool, task: list[int], align: list[int], causal: Path, tmp_path: Path
) -> None:
    """Three batches make a pass here: a flag that began anew with each would give the task two turns running."""
    seen: dict[str, list[int]] = {"task": [], "align": []}

    def look(name: str, number: int) -> BatchLoss:
        seen[name].append(number)
        return BatchLoss(torch.tensor(1.0), 1)

    own: dict[str, Any] = {"task": "slots", "train": [write_slots(tmp_path)], "pairs": write_pairs(tmp_path)}
    settings = JointSettings(
        **values(causal, tmp_path, **own, discard=discard, alternate="batch", batch_size=2, steps=None, epochs=3)
    )
    losses: Any = {name: lambda number, name=name: look(name, number) for name in seen}
    loss = JointLoss(losses, settings)
    turns = [list(loss(number).parts) for number in range(7)]
    assert turns == [["task"], ["align"]] * 3 + [["task"]]
    assert seen == {"task": task, "align": align}


def test_a_row_that_a_batch_draws_twice_is_not_its_own_negative(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, keeper=1.0)
    pairs = [
        Pair(languages=("jv", "en"), source="siji", target="one"),
        *(Pair(languages=("de", "en"), source=f"{n} da", target=f"{n} there") for n in range(9)),
    ]
    objective = AlignLoss(moved_base(settings), pairs, settings, layer=2)
    assert objective._sampler.batch(0).count(0) == 3
    assert objective(0).parts["align"][1] == 4
