"""The norm budget: never above, unchanged below, the same after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adaptermix import TaskSettings, load_adapter, train_task
from adaptermix.cli import main
from adaptermix.models.base import load_base
from adaptermix.training.lora import factors, inject
from adaptermix.training.norm_budget import NormBudget, product_norm, weight_norm
from adaptermix.training.trainer import Interrupted, Trainer

from ..refusals import refuses
from .data import write_pairs, write_slots
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:bitsandbytes")


def settings_for(base: Path, folder: Path, **more: object) -> TaskSettings:
    return TaskSettings(**values(base, folder, **({"task": "slots", "train": [write_slots(folder)]} | more)))


def shares(base: Path, adapter: Path) -> dict[str, float]:
    """|update| / |weight| of each module, from the dense product in float64."""
    model = load_base(str(base), dtype="float32", device="cpu").model
    found = {}
    for name, update in load_adapter(adapter).updates.items():
        delta = update.scale * (update.b.double() @ update.a.double())
        found[name] = float(delta.norm() / model.get_submodule(name).weight.double().norm())
    return found


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 7), st.integers(0, 99))
def test_the_norm_is_that_of_the_dense_product(out: int, rank: int, into: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)
    assert float(product_norm(b, a)) == pytest.approx(float((b.double() @ a.double()).norm()), rel=1e-10)
    assert float(product_norm(torch.zeros_like(b), a)) == 0.0


@pytest.mark.parametrize("rslora", [False, True])
def test_updates_are_never_above_and_those_below_are_not_touched(rslora: bool, causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, norm_budget=0.05, rslora=rslora, alpha=3.0)
    model = load_base(str(causal), dtype="float32", device="cpu").model
    inject(model, settings, seed=0)
    budget = NormBudget(model, settings)
    scale = 3.0 / 4**0.5 if rslora else 3.0 / 4
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for strength in (0.0, 1e-3, 1e-2, 0.03, 0.1, 1.0, 100.0):
        masters = {
            name: torch.randn(p.shape, generator=generator) * (strength if "lora_B" in name else 1.0)
            for name, p in factors(model).items()
        }
        before = {name: master.clone() for name, master in masters.items()}
        logged = budget.apply(masters)
        held = 0
        for name, b in masters.items():
            if "lora_A" in name:
                assert torch.equal(b, before[name])
                continue
            a = masters[name.replace("lora_B", "lora_A")].double()
            weight = model.get_submodule(name.partition(".lora_B")[0]).base_layer.weight.double()
            bound = 0.05 * float(weight.norm())
            norm = scale * float((before[name].double() @ a).norm())
            found = scale * float((b.double() @ a).norm())
            assert found <= bound
            if norm <= bound:
                assert torch.equal(b, before[name])
            else:
                held += 1
                assert found == pytest.approx(bound, rel=1e-5)
                torch.testing.assert_close(b, before[name] * (bound / norm), rtol=1e-5, atol=0)
            seen.add(norm <= bound)
        assert logged == {"held": held}
        after = {name: master.clone() for name, master in masters.items()}
        assert budget.apply(masters) == {"held": 0}
        assert all(torch.equal(masters[name], value) for name, value in after.items())
    assert seen == {True, False}


def test_it_holds_after_every_step_and_the_model_acts_by_it(causal: Path, tmp_path: Path) -> None:
    highest: list[float] = []
    original = Trainer._step

    def step(self: Any, loss_of: Any) -> Any:
        entry = original(self, loss_of)
        live = {name: p.detach() for name, p in self._live.items()}
        norms = [4.0 * product_norm(live[n], live[n.replace("lora_B", "lora_A")]) for n in live if "lora_B" in n]
        highest.append(float(torch.stack(norms).max()))
        return entry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        report = train_task(settings_for(causal, tmp_path, norm_budget=0.02, alpha=16.0))
    model = load_base(str(causal), dtype="float32", device="cpu").model
    largest = max(float(p.norm()) for name, p in model.named_parameters() if "proj" in name)
    assert len(highest) == 4
    assert max(highest) <= 0.02 * largest
    found = shares(causal, tmp_path / "out")
    assert max(found.values()) <= 0.02
    assert max(found.values()) == pytest.approx(0.02, rel=1e-4)
    assert report.history[-1]["held"] > 0


def test_a_wide_budget_changes_no_byte(causal: Path, tmp_path: Path) -> None:
    train_task(settings_for(causal, tmp_path))
    report = train_task(settings_for(causal, tmp_path, norm_budget=1e6, out=str(tmp_path / "wide")))
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "wide")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [entry["held"] for entry in report.history] == [0] * 4


def test_a_resumed_run_gives_the_same_bytes(causal: Path, tmp_path: Path) -> None:
    whole = settings_for(causal, tmp_path, norm_budget=0.02, steps=5, checkpoint_every=1, dropout=0.2)
    train_task(whole)
    broken = whole.model_copy(update={"out": str(tmp_path / "again")})
    original = Trainer._step

    def step(self: Any, loss_of: Any) -> Any:
        if self.done == 3:
            raise Interrupted
        return original(self, loss_of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(Interrupted):
            train_task(broken)
    train_task(broken.model_copy(update={"resume": True}))
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_the_norm_of_a_quantised_weight_is_that_of_its_values(quantize: str, wide: Path, tmp_path: Path) -> None:
    """Column by column of the identity, the layer itself says what its weight is."""
    pytest.importorskip("bitsandbytes")
    model = load_base(str(wide), dtype="float32", device="cpu", quantize=quantize).model
    module = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        dense = module(torch.eye(module.in_features))
    assert weight_norm(module, "down_proj") == pytest.approx(float(dense.double().norm()), rel=5e-3)
    train_task(settings_for(wide, tmp_path, norm_budget=0.02, quantize=quantize))
    found = shares(wide, tmp_path / "out")
    # the whole weights are a little longer or shorter than the quantised ones
    assert 0.018 < max(found.values()) < 0.022


def test_a_weight_whose_norm_cannot_be_had_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    for broken in (module, nn.Identity()):
        with refuses("train.norm-budget: q_proj"):
            weight_norm(broken, "q_proj")


def test_on_the_command_line(causal: Path, tmp_path: Path) -> None:
    line = f"train-align --base {causal} --pairs {' '.join(write_pairs(tmp_path))} --out {tmp_path}/a --steps 3 --quiet"
    with pytest.raises(SystemExit) as caught:
        main(
            [
                *line.split(),
                "--batch-size",
                "4",
                "--learning-rate",
                "0.05",
                "--norm-budget",
                "0.01",
                "--dtype",
                "float32",
            ]
        )
    assert not caught.value.code
    assert max(shares(causal, tmp_path / "a").values()) <= 0.01
    log = [json.loads(text) for text in (tmp_path / "a" / "history.jsonl").read_text().splitlines()]
    assert log[-1]["held"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("0", "--norm-budget"), ("-1", "--norm-budget"), ("nan", "--norm-budget"), ("0.1 --dora", "--dora changes")],
)
def test_other_budgets_are_refused_before_a_model_is_loaded(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"train-align --base none --pairs none --out {tmp_path}/a --norm-budget {arguments}"
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
