"""Each named option of training once in figures that a person can check on paper."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState

from adaptermix import AlignSettings, JointSettings, TaskSettings
from adaptermix.models.base import load_base
from adaptermix.tasks.data import Pair
from adaptermix.training.closed_form import fit_map
from adaptermix.training.displacement import Reader, Rows
from adaptermix.training.early_stopping import EarlyStopping
from adaptermix.training.joint import JointLoss, WithSum, turn
from adaptermix.training.lora import inject
from adaptermix.training.losses import contrastive_loss, distil_loss, keeper_loss
from adaptermix.training.pairs import pair_groups
from adaptermix.training.sampler import LengthSampler, Sampler
from adaptermix.training.trainer import BatchLoss, count_steps

from .test_trainer_numbers import trainer_for


def choices(settings: Any, name: str) -> set[str]:
    """Return the values that an option may have."""
    return set(get_args(settings.model_fields[name].annotation))


# of 10 steps 2 rise; then 8 fall: from 1 to 0 in eighths, along half a cosine, with the root of 2 / step
SCHEDULES = {
    "constant": [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [0, 0.5, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
    "inverse_sqrt": [0, 0.5, 1, 0.816497, 0.707107, 0.632456, 0.577350, 0.534522, 0.5, 0.471405],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_of_each_step(schedule: str, causal: Path, tmp_path: Path) -> None:
    assert set(SCHEDULES) == choices(TaskSettings, "schedule")
    trainer, live = trainer_for(causal, tmp_path, 10, schedule=schedule, warmup=0.2, learning_rate=0.01)
    rates = []

    def loss(_number: int) -> tuple[Tensor, int]:
        rates.append(trainer._optimizer.param_groups[0]["lr"])
        return (live[0] ** 2).sum(), 1

    trainer.run(loss, label="x")
    assert rates == pytest.approx([0.01 * share for share in SCHEDULES[schedule]], rel=1e-5)


STEPS = {
    "step": "t0 t1 a0 a1 t2 t3 a2 a3",
    "batch": "t0 a0 t1 a1 t2 a2 t3 a3",
    "sum": "ta0 ta1 ta2 ta3 ta4 ta5 ta6 ta7",
}


@pytest.mark.parametrize("alternate", STEPS)
def test_whose_turn_each_batch_is(alternate: str) -> None:
    """Two batches a step; the letter is the objective, the number counts its own batches."""
    assert set(STEPS) == choices(JointSettings, "alternate")
    found = [turn(alternate, number, 2) for number in range(8)]
    assert " ".join("".join(name[0] for name in names) + str(own) for names, own in found) == STEPS[alternate]


@pytest.mark.parametrize(
    ("alternate", "discard", "asked", "losses"),
    [
        # the task's loss is 1, that of alignment 10, which counts half
        ("step", False, "t0 t1 a0 a1", [1, 1, 5, 5]),
        ("step", True, "t0 t1 a2 a3", [1, 1, 5, 5]),
        # each has half of the step
        ("batch", False, "t0 a0 t1 a1", [0.5, 2.5, 0.5, 2.5]),
        ("batch", True, "t0 a1 t2 a3", [0.5, 2.5, 0.5, 2.5]),
        ("sum", False, "t0 a0 t1 a1 t2 a2 t3 a3", [6, 6, 6, 6]),
    ],
)
def test_what_each_batch_adds_to_the_loss_of_its_step(
    alternate: str, discard: bool, asked: str, losses: list[float]
) -> None:
    seen = []

    def loss_of(name: str, value: float) -> Any:
        def loss(number: int) -> BatchLoss:
            seen.append(f"{name[0]}{number}")
            return BatchLoss(torch.tensor(value), 1)

        return loss

    more: dict[str, Any] = {"alternate": alternate, "discard": discard, "align_weight": 0.5, "accumulate": 2}
    settings = JointSettings(base="b", out="o", task="slots", train=["x"], pairs=["y"], **more)
    joint = JointLoss({"task": loss_of("task", 1.0), "align": loss_of("align", 10.0)}, settings)
    assert [float(joint(number).loss) for number in range(4)] == losses
    assert " ".join(seen) == asked


def test_the_dev_loss_of_select_sum() -> None:
    found = WithSum(lambda: {"dev_task_loss": 1.0, "dev_align_loss": 10.0, "dev_align_accuracy": 0.9}, 0.5)()  # type: ignore[arg-type]
    assert found["dev_sum_loss"] == 6.0
    assert "dev_sum_loss" not in WithSum(lambda: {"dev_task_loss": 1.0}, 0.5)()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("balance", "drawn"), [("languages", {"de": 12, "fr": 12}), ("rows", {"de": 18, "fr": 6})], ids=str
)
def test_how_often_each_language_is_drawn(balance: str, drawn: dict[str, int]) -> None:
    """Three pairs of German and one of French, in batches of 8."""
    pairs = [Pair(languages=(code, "en"), source=str(row), target="x") for row, code in enumerate(["de"] * 3 + ["fr"])]
    sampler = Sampler(groups=pair_groups(pairs, balance), batch_size=8, seed=0)
    assert Counter(pairs[row].languages[0] for number in range(3) for row in sampler.batch(number)) == drawn


@pytest.mark.parametrize(
    ("rows", "more", "steps"),
    [
        (100, {"epochs": 2.5}, 16),  # 250 rows in batches of 16 are 15.6
        (96, {"epochs": 1}, 6),
        (97, {"epochs": 1}, 7),
        (3, {"epochs": 0.1}, 1),
        (100, {"epochs": 2.5, "steps": 5}, 5),
    ],
)
def test_the_steps_of_a_run(rows: int, more: dict[str, Any], steps: int) -> None:
    settings = TaskSettings(base="b", out="o", task="slots", train=["x"], batch_size=8, accumulate=2, **more)
    assert count_steps(rows, settings) == steps


@pytest.mark.parametrize(
    ("more", "turns", "looks"),
    [
        ({}, 1, [6, 12]),  # 100 rows in batches of 16 are 6.25
        ({}, 2, [12]),
        ({"evaluate_every": 5}, 1, [5, 10]),
        ({"evaluate_every": 99}, 1, [13]),  # at the end at the latest
        # losses 3, 2, 4, 2 and 5: two looks without a new best, where as good as the best is not new
        ({"evaluate_every": 1, "patience": 2}, 1, [1, 2, 3, 4]),
        ({"evaluate_every": 1, "patience": 3}, 1, [1, 2, 3, 4, 5]),
    ],
)
def test_when_dev_rows_are_looked_at_and_when_that_ends_a_run(
    more: dict[str, Any], turns: int, looks: list[int]
) -> None:
    settings = TaskSettings(
        base="b", out="o", task="slots", train=["x"], dev=["y"], batch_size=8, accumulate=2, steps=13, **more
    )
    values = iter([3.0, 2.0, 4.0, 2.0, 5.0, *[5.0] * 9])
    stopping = EarlyStopping(settings, steps=13, rows=100, key="dev_loss", turns=turns)
    state, control = TrainerState(), TrainerControl()
    stopping.on_train_begin(settings, state, control)
    while state.global_step < 13 and not control.should_training_stop:
        state.global_step += 1
        control.should_evaluate = False
        stopping.on_step_end(settings, state, control)
        if control.should_evaluate:
            state.log_history.append({"step": state.global_step, "dev_loss": next(values)})
            stopping.on_evaluate(settings, state, control)
    assert [entry["step"] for entry in state.log_history] == looks
    assert state.best_global_step == (2 if "patience" in more else None)


def test_batches_of_like_length() -> None:
    """Rows as long as their number: each batch has neighbours, and the batches come in an order that is drawn."""
    plain = Sampler(groups=[range(8)], batch_size=2, seed=0)
    grouped = LengthSampler(sampler=plain, lengths=list(range(8)))
    found = [grouped.batch(number) for number in range(4)]
    assert sorted(found) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found != sorted(found)


# sources e1 and e2, targets e1 and e1: cosines 1 1 / 0 0
SOURCES, TARGETS = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [5.0, 0.0]])
LEAST, MOST = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, math.log(2)),  # each source sees two targets that are alike
        ({"temperature": 0.1}, math.log(2)),
        # the other way round the first target finds its source, the second that of the first
        ({"temperature": 1.0, "symmetric": True}, (math.log(2) + (LEAST + MOST) / 2) / 2),
        ({"temperature": 0.5, "symmetric": True}, (math.log(2) + math.log(1 + math.exp(-2)) + 1) / 2),
        ({"temperature": 1.0, "same": torch.ones(2, 2, dtype=torch.bool)}, 0.0),  # nothing is left to tell apart
    ],
)
def test_the_contrastive_loss_of_two_pairs(options: dict[str, Any], expected: float) -> None:
    assert float(contrastive_loss(SOURCES, TARGETS, **options)) == pytest.approx(expected, rel=1e-6)


def test_distances_of_the_other_objectives() -> None:
    states, targets = torch.tensor([[1.0, 2.0], [0.0, 6.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    # (1 + 1 + 0 + 9) / 4 in spreads of 1 and 2
    assert float(distil_loss(states, targets, torch.tensor([1.0, 2.0]))) == pytest.approx(11 / 4)
    # the first token stays, the second loses half of its length
    assert float(keeper_loss(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]]))) == 0.125


@pytest.mark.parametrize(
    ("pooling", "last", "roles", "expected"),
    [
        # tokens 8, 2 and 5 and one of padding; all but the first count
        ("mean", True, ["mean", "last"], [3.5, 5]),
        ("mean", False, ["mean", "first"], [3.5, 8]),
        ("bos", True, ["last"], [5]),
        ("bos", False, ["first"], [8]),
    ],
)
def test_the_vectors_that_a_closed_form_is_fitted_to(
    pooling: str, last: bool, roles: list[str], expected: list[float]
) -> None:
    class Tap:
        def __call__(self, _encoded: Any) -> tuple[Tensor, Tensor, Tensor]:
            states = torch.tensor([[[8.0], [2.0], [5.0], [100.0]], [[4.0]] * 4])
            return states, torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]), states

    class Sentence:
        def __init__(self, count: int) -> None:
            self.ids = [0] * count

    reader = Reader(Tap(), batch_size=2, pooling=pooling, last=last)  # type: ignore[arg-type]
    tokens = reader.read([Sentence(3), Sentence(4)], [0, 1])  # type: ignore[list-item]
    assert reader.roles == roles
    assert tokens.pooled(tokens.states, reader.roles)[0, :, 0].tolist() == pytest.approx(expected)


def test_the_mean_shift_of_two_pairs() -> None:
    """Moves of (2, 0) and of (0, 4), which counts three times as much; a translation stays and has no part."""
    rows = Rows(
        x=torch.tensor([[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]]).double(),
        y=torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]).double(),
        weights=torch.tensor([5.0, 1.0, 3.0]).double(),
        groups=torch.tensor([0, 0, 1]),
        roles=torch.zeros(3, dtype=torch.long),
        moving=torch.tensor([False, True, True]),
    )
    found = fit_map(rows, torch.ones(2).double(), shift_only=True)
    assert found(torch.tensor([[7.0, -7.0]]).double()).tolist() == [[0.5, 3.0]]
    # in spreads of 2 and 4 the moves are (1, 0) and (0, 1)
    found = fit_map(rows, torch.tensor([2.0, 4.0]).double(), shift_only=True)
    assert found(torch.tensor([[7.0, -7.0]]).double()).tolist() == [[0.25, 0.75]]


INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")


@pytest.mark.parametrize("init", INITS)
def test_what_a_lora_begins_with(init: str, causal: Path, tmp_path: Path) -> None:
    """Of rank 4 and scale 16 / 4, on a weight of 32 inputs."""
    assert set(INITS) == choices(AlignSettings, "init")
    base = load_base(str(causal), dtype="float32", device="cpu")
    path = "model.layers.1.self_attn.q_proj"
    before = base.model.get_submodule(path).weight.detach().clone()
    settings = AlignSettings(base=str(causal), pairs=["x"], out=str(tmp_path), rank=4, alpha=16, init=init)  # type: ignore[arg-type]
    inject(base.model, settings, seed=0)
    module: Any = base.model.get_submodule(path)
    a, b = (module.get_submodule(f"lora_{part}.default").weight.detach() for part in "AB")
    if init in ("kaiming", "gaussian"):
        assert not b.any()
    if init == "kaiming":  # uniform within 1 / sqrt(32)
        assert 0.95 / math.sqrt(32) < float(a.abs().max()) <= 1 / math.sqrt(32)
    if init == "gaussian":  # of deviation 1 / rank
        assert float(a.std()) == pytest.approx(1 / 4, rel=0.2)
        assert float(a.abs().max()) > 1 / 4
    if init == "orthogonal":  # both are there, and their product is nothing
        assert float(a.abs().max()) > 0.05 < float(b.abs().max())
        assert float((b @ a).abs().max()) < 1e-6
    if init == "pissa":
        u, sigma, vh = torch.linalg.svd(before)
        torch.testing.assert_close(4 * b @ a, u[:, :4] * sigma[:4] @ vh[:4], rtol=1e-3, atol=1e-5)
    if init == "olora":  # as PEFT has it, times the scale
        q, r = torch.linalg.qr(before)
        torch.testing.assert_close(4 * b @ a, 4 * q[:, :4] @ r[:4], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(module.base_layer.weight + 4 * b @ a, before, rtol=1e-4, atol=1e-5)
