"""Early stopping, kinds of LoRA, batches by length, training on top of an adapter."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix import AlignSettings, TaskSettings, load_adapter, merge, train_task
from adaptermix.models.base import load_base
from adaptermix.training.lora import extract, factors, inject, scales, start_of
from adaptermix.training.sampler import LengthSampler, Sampler
from adaptermix.training.trainer import Interrupted

from ..factories import load_with_peft
from ..refusals import refuses
from .data import write_slots
from .test_joint import values


def settings_for(base: Path, folder: Path, **more: object) -> TaskSettings:
    return TaskSettings(**values(base, folder, task="slots", train=[write_slots(folder)], **more))


class TestEarlyStopping:
    def overfitted(self, base: Path, folder: Path, **more: object) -> TaskSettings:
        """A dev set with other answers: its loss falls, then rises."""
        rows = [{"text": f"go {word}", "slots": [{"type": "c", "value": "z"}]} for word in ("red", "blue")]
        (folder / "dev.en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        common: dict[str, object] = {"dev": [str(folder / "dev.en.jsonl")], "evaluate_every": 2, "steps": 60}
        return settings_for(base, folder, **(common | more))

    def test_the_best_factors_are_kept(self, causal: Path, tmp_path: Path) -> None:
        report = train_task(self.overfitted(causal, tmp_path, patience=2))
        looks = [(entry["step"], entry["dev_loss"]) for entry in report.history if "dev_loss" in entry]
        best = min(looks, key=lambda look: look[1])
        assert looks[-1][0] < 60
        assert looks.index(best) == len(looks) - 3
        document = report.document()
        assert (document["steps"], document["steps_planned"], document["kept_step"]) == (looks[-1][0], 60, best[0])
        manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
        assert manifest["selection"] == {"kept_step": best[0], "steps": looks[-1][0]}
        train_task(self.overfitted(causal, tmp_path, steps=best[0], out=str(tmp_path / "short")))
        first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "short"))
        assert first == second

    def test_a_run_that_ends_between_its_last_checkpoint_and_its_output(self, causal: Path, tmp_path: Path) -> None:
        import adaptermix.training.runner as module

        def die(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        whole = self.overfitted(causal, tmp_path, patience=2)
        report = train_task(whole)
        broken = whole.model_copy(update={"out": str(tmp_path / "again")})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "write_documents", die)
            with pytest.raises(KeyboardInterrupt):
                train_task(broken)
        resumed = train_task(broken.model_copy(update={"resume": True}))
        assert (resumed.kept, resumed.history[-1]["step"]) == (report.kept, report.history[-1]["step"])
        manifests = [json.loads((tmp_path / name / "adaptermix.json").read_text()) for name in ("out", "again")]
        assert manifests[0]["selection"] == manifests[1]["selection"]
        first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
        assert first == second

    def test_a_resumed_run_stops_where_an_unbroken_one_does(self, causal: Path, tmp_path: Path) -> None:
        import adaptermix.training.trainer as module

        whole = self.overfitted(causal, tmp_path, patience=2, checkpoint_every=1)
        report = train_task(whole)
        last = report.history[-1]["step"]
        broken = whole.model_copy(update={"out": str(tmp_path / "again")})
        for stop in (3, last - 1):
            before = module.Trainer._step

            def step(self: Any, loss_of: Any, stop: int = stop, before: Any = before) -> Any:
                if self.done == stop:
                    raise Interrupted
                return before(self, loss_of)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module.Trainer, "_step", step)
                with pytest.raises(Interrupted):
                    train_task(broken)
            broken = broken.model_copy(update={"resume": True})
        train_task(broken)
        for name in ("adapter_model.safetensors",):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


class TestKindsOfLora:
    @pytest.mark.parametrize(
        "more",
        [
            {"rslora": True},
            {"dora": True},
            {"rslora": True, "dora": True},
            {"init": "gaussian"},
            {"init": "orthogonal"},
            {"init": "pissa"},
            {"init": "olora", "rslora": True},
        ],
    )
    def test_peft_alone_acts_as_the_model_in_training_did(
        self, more: dict[str, bool], causal: Path, tmp_path: Path
    ) -> None:
        import adaptermix.training.runner as module

        seen: dict[str, torch.Tensor] = {}
        tokens = torch.arange(3, 20)[None]
        original = module.state_of

        def look(base: Any, *rest: Any) -> Any:
            with torch.no_grad():
                seen["logits"] = base.model.eval()(tokens).logits
            return original(base, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "state_of", look)
            train_task(settings_for(causal, tmp_path, **more))
        with torch.no_grad():
            found = load_with_peft(causal, tmp_path / "out")(tokens).logits
        torch.testing.assert_close(found, seen["logits"], rtol=1e-4, atol=1e-5)
        assert load_adapter(tmp_path / "out").meta.dora == more.get("dora", False)

    @pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
    def test_a_lora_begins_where_the_base_is(self, init: str, causal: Path, tmp_path: Path) -> None:
        base = load_base(str(causal), dtype="float32", device="cpu")
        tokens = torch.arange(3, 20)[None]
        before = base.model(tokens).logits
        settings = settings_for(causal, tmp_path, init=init)
        inject(base.model, settings, seed=0)
        torch.testing.assert_close(base.model(tokens).logits, before, rtol=1e-4, atol=1e-5)
        updates = extract(factors(base.model), scales(base.model), start_of(base.model, settings)).updates
        assert max(float(update.dense().abs().max()) for update in updates.values()) < 1e-5
        assert {update.rank for update in updates.values()} == {8 if init in ("pissa", "olora") else 4}

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"init": "orthogonal", "rank": 3}, "train.orthogonal-rank: 3"),
            ({"init": "orthogonal", "quantize": "nf4"}, "train.orthogonal-quantized"),
            ({"init": "pissa", "quantize": "nf4"}, "train.init-option: quantize"),
            ({"init": "olora", "norm_budget": 0.1}, "train.init-option: norm-budget"),
        ],
    )
    def test_a_start_that_does_not_go_with_the_rest_is_refused(
        self, more: dict[str, object], message: str, causal: Path, tmp_path: Path
    ) -> None:
        with refuses(message):
            settings_for(causal, tmp_path, **more)
        for own, name in (({"anchor": "base"}, "anchor base"), ({"standardize": "all"}, "standardize")):
            with refuses(f"train.init-option: --{name}"):
                AlignSettings(base="b", pairs=["x"], out="x", init="pissa", **own)
        with refuses("train.init-dtype: pissa.*bfloat16"):
            train_task(settings_for(causal, tmp_path, init="pissa", dtype="bfloat16"))

    def test_a_dora_that_is_not_trained_acts_as_the_base(self, causal: Path, tmp_path: Path) -> None:
        base = load_base(str(causal), dtype="float32", device="cpu")
        tokens = torch.arange(3, 20)[None]
        before = base.model(tokens).logits
        inject(base.model, settings_for(causal, tmp_path, dora=True), seed=0)
        torch.testing.assert_close(base.model(tokens).logits, before, rtol=1e-4, atol=1e-5)

    def test_lora_plus_moves_b_faster(self, causal: Path, tmp_path: Path) -> None:
        """AdamW's first step is the learning rate times the sign of the gradient."""
        train_task(settings_for(causal, tmp_path, steps=1, learning_rate=1e-3, alpha=4.0))
        train_task(
            settings_for(
                causal, tmp_path, steps=1, learning_rate=1e-3, alpha=4.0, lora_plus=8.0, out=str(tmp_path / "p")
            )
        )
        plain, plus = load_adapter(tmp_path / "out"), load_adapter(tmp_path / "p")
        for module, update in plain.updates.items():
            torch.testing.assert_close(plus.updates[module].b, 8 * update.b, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(plus.updates[module].a, update.a)

    def test_checkpointed_activations_change_nothing(self, causal: Path, tmp_path: Path) -> None:
        train_task(settings_for(causal, tmp_path))
        train_task(settings_for(causal, tmp_path, gradient_checkpointing=True, out=str(tmp_path / "p")))
        one, two = load_adapter(tmp_path / "out"), load_adapter(tmp_path / "p")
        for module, update in one.updates.items():
            torch.testing.assert_close(two.updates[module].dense(), update.dense(), rtol=1e-4, atol=1e-6)


class TestOnTop:
    def test_both_merged_with_weight_one_act_as_the_model_in_training(self, causal: Path, tmp_path: Path) -> None:
        first = train_task(settings_for(causal, tmp_path, steps=3, out=str(tmp_path / "first")))
        second = train_task(
            settings_for(causal, tmp_path, steps=1, on_top_of=str(tmp_path / "first"), out=str(tmp_path / "second"))
        )
        # the same rows again: it begins where the first one ended
        assert second.history[0]["loss"] < first.history[0]["loss"]
        merge([tmp_path / "first", tmp_path / "second"], weights=[1.0, 1.0], out=tmp_path / "both")
        third = train_task(
            settings_for(causal, tmp_path, steps=1, on_top_of=str(tmp_path / "both"), out=str(tmp_path / "third"))
        )
        after = train_task(
            settings_for(causal, tmp_path, steps=2, on_top_of=str(tmp_path / "first"), out=str(tmp_path / "more"))
        )
        assert third.history[0]["loss"] == pytest.approx(after.history[1]["loss"], rel=1e-4)
        manifest = json.loads((tmp_path / "second" / "adaptermix.json").read_text())
        assert [entry["name"] for entry in manifest["inputs"]] == ["first"]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=130), st.integers(1, 7), st.integers(0, 50))
def test_batches_by_length_hold_every_row_once_per_pass(lengths: list[int], size: int, seed: int) -> None:
    plain = Sampler(groups=[range(len(lengths))], batch_size=size, seed=seed)
    grouped = LengthSampler(sampler=plain, lengths=lengths)
    for passes in (1, 2, 3):
        batches = -(-passes * len(lengths) // size)
        one, two = ([row for n in range(batches) for row in s.batch(n)] for s in (plain, grouped))
        assert sorted(one) == sorted(two)
        assert min(Counter(two)[row] for row in range(len(lengths))) >= passes
    again = LengthSampler(sampler=plain, lengths=lengths)
    assert [again.batch(n) for n in reversed(range(batches))][::-1] == [grouped.batch(n) for n in range(batches)]


def test_a_pass_that_is_no_whole_number_of_windows_holds_every_row_once() -> None:
    """75 batches make a pass here, and a window at most 50."""
    plain = Sampler(groups=[range(2400)], batch_size=32, seed=0)
    grouped = LengthSampler(sampler=plain, lengths=[(7 * row) % 101 + 1 for row in range(2400)])
    for epoch in (0, 1):
        rows = [row for number in range(75 * epoch, 75 * (epoch + 1)) for row in grouped.batch(number)]
        assert sorted(rows) == list(range(2400))


def test_batches_by_length_are_padded_less() -> None:
    lengths = [(7 * row) % 101 + 1 for row in range(400)]
    plain = Sampler(groups=[range(400)], batch_size=8, seed=0)
    grouped = LengthSampler(sampler=plain, lengths=lengths)
    one, two = (sum(8 * max(lengths[row] for row in s.batch(n)) for n in range(50)) for s in (plain, grouped))
    assert sum(lengths) <= two < 1.1 * sum(lengths)
    assert one > 1.6 * sum(lengths)
    order = [lengths[grouped.batch(n)[0]] for n in range(50)]
    assert order != sorted(order)
