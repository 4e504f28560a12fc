"""Distillation: its targets, its loss, what is frozen, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptermix import AlignSettings, JointSettings, train_align, train_joint
from adaptermix.cli import main
from adaptermix.models.base import BaseModel, backbone, load_base
from adaptermix.models.eval_mode import evaluating
from adaptermix.tasks.data import read_pairs
from adaptermix.training.align import AlignLoss, BothLosses, alignment_loss
from adaptermix.training.distil import DistilLoss
from adaptermix.training.early_stopping import DevLosses
from adaptermix.training.frozen_adapter import attach_on
from adaptermix.training.lora import inject
from adaptermix.training.losses import distil_loss, spread_of

from ..refusals import refuses
from .data import write_pairs, write_slots
from .test_accumulation import SPLITS, Crowd, assert_same, gradients, moved
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROWS = [0, 3, 13]
KINDS = [("causal", False), ("causal", True), ("encoder", False), ("encoder", True)]


def settings_for(base: Path, folder: Path, **more: object) -> AlignSettings:
    return AlignSettings(**values(base, folder, **({"pairs": write_pairs(folder), "objective": "distil"} | more)))


def moved_base(settings: AlignSettings) -> BaseModel:
    """A base whose LoRA does something, and whose own dropout would be seen."""
    base = load_base(settings.base, dtype="float32", device="cpu")
    inject(base.model, settings, seed=0)
    moved(base)
    for module in base.model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.5
    return base


def by_hand(settings: AlignSettings, texts: list[str], model: BaseModel, layer: int, *, last: bool) -> Tensor:
    """Mean and edge token of each text from whole forward passes of one text each, in float64."""
    found = []
    for text in texts:
        ids = model.tokenizer(text)["input_ids"]
        states = backbone(model)(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].double()
        special = settings.exclude_bos and ids[0] in model.tokenizer.all_special_ids
        # the first token of a language model is left out
        found.append(torch.cat([states[1 if special or last else 0 :].mean(0), states[-1 if last else 0]]))
    return torch.stack(found)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_it_is_the_mean_squared_distance_in_spreads(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states, targets = (torch.randn(rows, width, generator=generator) for _ in range(2))
    spread = torch.rand(width, generator=generator) + 0.1
    total = 0.0
    for row in range(rows):
        for place in range(width):
            total += ((float(states[row, place]) - float(targets[row, place])) / float(spread[place])) ** 2
    assert float(distil_loss(states, targets, spread)) == pytest.approx(total / (rows * width), rel=1e-5)
    assert float(distil_loss(targets, targets, spread)) == 0.0


def test_the_mean_of_the_targets_is_at_distance_one() -> None:
    targets = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1, 1, 1, 1, 900])
    spread = spread_of(targets)
    assert spread[6] == pytest.approx(float(targets[:, 6].double().std(correction=0)), rel=1e-5)
    least = 0.01 * float(targets.double().std(0, correction=0).square().mean().sqrt())
    assert spread[0] == pytest.approx(least, rel=1e-5)
    found = distil_loss(targets.mean(0).expand_as(targets)[:, 6:], targets[:, 6:], spread[6:])
    assert float(found) == pytest.approx(1.0, rel=1e-5)
    assert spread_of(torch.ones(3, 2)).tolist() == [1.0, 1.0]


def test_no_gradient_reaches_the_targets_and_it_is_computed_in_float32() -> None:
    states, targets = (torch.full((2, 300), value).bfloat16().requires_grad_() for value in (1.0, 2.0))
    found = distil_loss(states, targets, torch.full((300,), 0.5))
    assert (found.dtype, float(found.detach())) == (torch.float32, 4.0)
    found.backward()
    assert states.grad is not None
    assert targets.grad is None


@torch.no_grad()
@pytest.mark.parametrize(("kind", "exclude_bos"), KINDS)
def test_the_loss_equals_that_of_whole_forward_passes(
    kind: str, exclude_bos: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = settings_for(request.getfixturevalue(kind), tmp_path, exclude_bos=exclude_bos, layer=3, dropout=0.0)
    pairs, _ = read_pairs(settings.pairs)
    base = moved_base(settings)
    objective = DistilLoss(base, pairs, settings, layer=3)
    plain = load_base(settings.base, dtype="float32", device="cpu")
    last = kind == "causal"
    every = by_hand(settings, list(dict.fromkeys(pair.target for pair in pairs)), plain, 3, last=last)
    targets = by_hand(settings, [pairs[row].target for row in ROWS], plain, 3, last=last)
    student = by_hand(settings, [pairs[row].source for row in ROWS], base, 3, last=last)
    expected = float((((student - targets) / spread_of(every)) ** 2).mean())
    found = objective.of_rows(ROWS)
    assert expected > 0.01
    assert float(found.loss) == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_one_sentence_in_four_is_a_target_itself(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    settings = settings_for(request.getfixturevalue(kind), tmp_path, dropout=0.0, batch_size=6)
    pairs, _ = read_pairs(settings.pairs)
    base = moved_base(settings)
    objective = DistilLoss(base, pairs, settings, layer=2)
    assert [is_target for number in (0, 1) for _, is_target in objective.items(number)] == 3 * [
        *(False, False, False, True)
    ]
    plain = load_base(settings.base, dtype="float32", device="cpu")
    last = kind == "causal"
    every = by_hand(settings, list(dict.fromkeys(pair.target for pair in pairs)), plain, 2, last=last)
    items = objective.items(0)
    read = [pairs[row].target if is_target else pairs[row].source for row, is_target in items]
    student = by_hand(settings, read, base, 2, last=last)
    targets = by_hand(settings, [pairs[row].target for row, _ in items], plain, 2, last=last)
    expected = float((((student - targets) / spread_of(every)) ** 2).mean())
    found = objective(0)
    assert float(found.loss) == pytest.approx(expected, rel=1e-3)
    assert found.tokens == sum(len(base.tokenizer(text)["input_ids"]) for text in read)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_base_has_no_dropout_of_its_own_and_the_lora_has(dora: bool, encoder: Path, tmp_path: Path) -> None:
    pairs, _ = read_pairs(write_pairs(tmp_path))
    for dropout, same in ((0.0, True), (0.5, False)):
        settings = settings_for(encoder, tmp_path, dropout=dropout, dora=dora)
        base = moved_base(settings)
        objective = DistilLoss(base, pairs, settings, layer=2)
        with evaluating(base.model):  # a look at dev pairs in between changes nothing
            objective.of_rows(ROWS)
        losses = [float(objective(0).loss.detach()) for _ in range(2)]
        assert (losses[0] == losses[1]) is same


def test_recomputed_blocks_give_the_same_gradients(encoder: Path, tmp_path: Path) -> None:
    pairs, _ = read_pairs(write_pairs(tmp_path))
    found, runs = [], []
    for recomputed in (False, True):
        settings = settings_for(encoder, tmp_path, dropout=0.0, gradient_checkpointing=recomputed)
        base = moved_base(settings)
        objective = DistilLoss(base, pairs, settings, layer=2)
        seen: list[int] = []
        block = next(module for name, module in base.model.named_modules() if name.endswith("layer.0"))
        block.attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found.append(gradients(base, [objective], 1))
        runs.append(len(seen))
    assert_same(*found)
    assert runs[1] == 2 * runs[0]


def test_an_adapter_below_belongs_to_the_teacher(causal: Path, tmp_path: Path) -> None:
    below = settings_for(causal, tmp_path, objective="contrastive", steps=3, learning_rate=0.1, out=str(tmp_path / "b"))
    train_align(below)
    settings = settings_for(causal, tmp_path, on_top_of=str(tmp_path / "b"))
    pairs, _ = read_pairs(settings.pairs)
    base = load_base(settings.base, dtype="float32", device="cpu")
    attach_on(base.model, settings, headed=False)
    inject(base.model, settings, seed=0)
    moved(base)
    objective = DistilLoss(base, pairs, settings, layer=2)
    both = load_base(settings.base, dtype="float32", device="cpu")
    attach_on(both.model, settings, headed=False)
    texts = list(dict.fromkeys(pair.target for pair in pairs))
    with torch.no_grad():
        with_below = by_hand(settings, texts, both, 2, last=True)
        alone = by_hand(settings, texts, load_base(settings.base, dtype="float32", device="cpu"), 2, last=True)
    assert float((with_below - alone).norm()) > 1e-3
    torch.testing.assert_close(objective._targets.double(), with_below, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_batches_and_processes_give_the_step_of_one_large_batch(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = []
    for size, accumulate, count in SPLITS:
        settings = settings_for(
            request.getfixturevalue(kind), tmp_path, dropout=0.0, batch_size=max(2, size), accumulate=accumulate
        ).model_copy(update={"batch_size": size})
        pairs, _ = read_pairs(settings.pairs)
        base = moved_base(settings)
        losses = [DistilLoss(base, pairs, settings, layer=2, processes=Crowd(count, rank)) for rank in range(count)]
        found.append(gradients(base, losses, accumulate))
    for other in found[1:]:
        assert_same(found[0], other)


def test_the_teacher_is_computed_once_for_each_different_sentence(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path)
    pairs, _ = read_pairs(settings.pairs)
    base = moved_base(settings)
    seen: list[int] = []
    base.model.get_input_embeddings().register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    objective = DistilLoss(base, pairs, settings, layer=2)
    assert sum(seen) == len({pair.target for pair in pairs})
    seen.clear()
    objective(0)
    assert sum(seen) == settings.batch_size


@pytest.mark.parametrize("objective", ["distil", "both"])
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_training_brings_translations_to_where_the_base_has_english(
    objective: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = settings_for(
        request.getfixturevalue(kind),
        tmp_path,
        objective=objective,
        steps=40,
        learning_rate=1e-2,
        dev_pairs=[str(tmp_path / "fr-en.tsv")],
        evaluate_every=40,
        dtype="float32",
    )
    report = train_align(settings)
    losses = [entry["loss"] for entry in report.history if "seconds" in entry]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    (look,) = [entry for entry in report.history if "dev_loss" in entry]
    assert 0 <= look["dev_accuracy"] <= 1
    document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert document["objective"] == {"name": objective, "layer": 2, "layers": 4, "pairs": 15}
    assert document["languages"] == {"aligned": ["de", "en", "fr"]}


def test_both_is_the_sum_without_the_dropout_of_the_base(encoder: Path, tmp_path: Path) -> None:
    settings = settings_for(encoder, tmp_path, objective="both", dropout=0.0)
    pairs, _ = read_pairs(settings.pairs)
    base = moved_base(settings)
    found = alignment_loss(base, pairs, settings, layer=2)
    assert isinstance(found, BothLosses)
    whole = found(0)
    base.model.eval()
    parts = [float(one(0).loss.detach()) for one in (found._losses["contrastive"], found._losses["distil"])]
    assert float(whole.loss.detach()) == pytest.approx(sum(parts), rel=1e-5)
    assert isinstance(found._losses["contrastive"], AlignLoss)


def test_the_dev_loss_of_both_is_the_sum_of_their_dev_losses_also_with_a_keeper(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, objective="both", keeper=3.0, batch_size=4)
    pairs, _ = read_pairs(settings.pairs)
    base = moved_base(settings)
    losses = {
        "both": alignment_loss(base, pairs, settings, layer=2),
        "contrastive": AlignLoss(base, pairs, settings, layer=2),
        "distil": DistilLoss(base, pairs, settings, layer=2),
    }
    found = DevLosses(base, {f"{name}_loss": loss.of_rows for name, loss in losses.items()}, settings)()
    assert found["both_loss"] == pytest.approx(found["contrastive_loss"] + found["distil_loss"], rel=1e-5)
    batch = losses["both"](0)
    assert list(batch.parts) == ["contrastive", "keeper", "distil"]
    parts = {name: float(loss.detach()) for name, (loss, _) in batch.parts.items()}
    assert float(batch.loss.detach()) == pytest.approx(
        parts["contrastive"] + 3.0 * parts["keeper"] + parts["distil"], rel=1e-5
    )


@pytest.mark.parametrize("objective", ["distil", "both"])
def test_joint_training_takes_it_in_turns_with_the_task(objective: str, causal: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"task": "slots", "train": [write_slots(tmp_path)], "pairs": write_pairs(tmp_path)}
    report = train_joint(
        JointSettings(**values(causal, tmp_path, **more, objective=objective, steps=6, dtype="float32"))
    )
    assert [("task" in entry["objectives"]) for entry in report.history] == [True, False] * 3
    document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert document["objective"]["name"] == objective


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--temperature", "0.2"], "--temperature"),
        (["--standardize", "all"], "--standardize"),
        (["--keeper", "1"], "--keeper"),
        (["--pooling", "bos"], "--pooling"),
        (["--anchor", "base"], "--anchor"),
    ],
)
def test_options_of_the_contrast_are_refused(
    option: list[str], named: str, causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(tmp_path)
    call = ["train-align", "--base", str(causal), "--pairs", *pairs, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*call, "--objective", "distil", *option])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{named} is for the contrastive objective" in said
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_part_of_its_weights_is_no_teacher(causal: Path, tmp_path: Path) -> None:
    with refuses("train.init-option: objective distil"):
        settings_for(causal, tmp_path, init="pissa", dtype="float32")
    own: dict[str, Any] = {"base": "b", "pairs": ["de-en.tsv"], "out": "o"}
    assert AlignSettings(**own).objective == "distil"
    assert AlignSettings(**own, init="pissa").objective == "contrastive"
    with refuses("align.fit-option: init.*least-squares"):
        AlignSettings(**own, init="pissa", fit="least-squares")


def test_a_stopped_run_goes_on_to_the_same_weights(causal: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from adaptermix.training import distil

    pairs = write_pairs(tmp_path)
    made = {}
    for name in ("whole", "stopped"):
        settings = settings_for(
            causal, tmp_path, pairs=pairs, steps=6, checkpoint_every=2, out=str(tmp_path / name), dtype="float32"
        )
        if name == "stopped":
            real = distil.DistilLoss.__call__

            def failing(self: DistilLoss, number: int, real: Any = real) -> Any:
                if number == 4:
                    raise RuntimeError("stop")
                return real(self, number)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(distil.DistilLoss, "__call__", failing)
                with pytest.raises(RuntimeError, match="stop"):
                    train_align(settings)
            settings = settings.model_copy(update={"resume": True})
        train_align(settings)
        made[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert all(torch.equal(tensor, made["stopped"][key]) for key, tensor in made["whole"].items())


def test_a_quantised_base_is_its_own_teacher(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = settings_for(wide, tmp_path, quantize="nf4", dtype="float32")
    pairs, _ = read_pairs(settings.pairs)
    found = {}
    for quantize in ("nf4", "none"):
        base = load_base(settings.base, dtype="float32", device="cpu", quantize=quantize)
        inject(base.model, settings, seed=0)
        moved(base)
        objective = DistilLoss(base, pairs, settings, layer=2)
        plain = load_base(settings.base, dtype="float32", device="cpu", quantize=quantize)
        with torch.no_grad():
            found[quantize] = by_hand(settings, list(dict.fromkeys(pair.target for pair in pairs)), plain, 2, last=True)
        torch.testing.assert_close(objective._targets.double(), found[quantize], rtol=1e-3, atol=1e-4)
    assert float((found["nf4"] - found["none"]).norm()) > 1e-3


@pytest.mark.parametrize(
    ("more", "objective"),
    [
        ({}, "distil"),
        ({"temperature": 0.1}, "contrastive"),
        ({"standardize": "all"}, "contrastive"),
        ({"objective": "both", "temperature": 0.2}, "both"),
        ({"fit": "least-squares", "pooling": "bos"}, "distil"),
    ],
)
def test_an_option_of_the_contrast_chooses_it(more: dict[str, Any], objective: str) -> None:
    assert AlignSettings(base="base", pairs=["de-en.tsv"], out="out", **more).objective == objective
