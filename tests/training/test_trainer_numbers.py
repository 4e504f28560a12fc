"""The arithmetic of the loop: accumulation, precision, learning rates, and what is not finite."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from adaptermix import EvaluateSettings, TaskSettings, evaluate, train_task
from adaptermix.io.files import partial_path
from adaptermix.models.base import load_base
from adaptermix.models.positions import shortened
from adaptermix.tasks import get_task, get_template
from adaptermix.training.checkpoint import Workplace
from adaptermix.training.lora import factors, inject
from adaptermix.training.task import encode_rows
from adaptermix.training.trainer import Trainer

from ..factories import contents
from ..refusals import refuses
from ..tiny import tiny_causal
from .data import write_slots
from .test_task import settings_for

WEIGHTS = "adapter_model.safetensors"


def trainer_for(base: Path, folder: Path, steps: int, **more: Any) -> tuple[Trainer, list[torch.nn.Parameter]]:
    settings = settings_for(base, folder, steps=steps, **more)
    model = load_base(settings.base, dtype=settings.dtype, device="cpu").model
    inject(model, settings, seed=0)
    trainer = Trainer(model, settings, steps=steps, workplace=Workplace(folder / "x", {}))
    return trainer, list(factors(model).values())


def weights(folder: Path, name: str = WEIGHTS) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def test_two_accumulated_batches_give_the_weights_of_one_of_both(causal: Path, tmp_path: Path) -> None:
    """All answers have equally many tokens, so the mean of means is the mean."""
    halves = settings_for(causal, tmp_path, batch_size=3, accumulate=2, steps=4, out=str(tmp_path / "halves"))
    train_task(halves)
    train_task(halves.model_copy(update={"batch_size": 6, "accumulate": 1, "out": str(tmp_path / "whole")}))
    train_task(halves.model_copy(update={"accumulate": 1, "out": str(tmp_path / "half")}))
    one, other, less = (weights(tmp_path / name) for name in ("halves", "whole", "half"))
    apart = max(float((one[key] - other[key]).abs().max()) for key in one)
    far = max(float((one[key] - less[key]).abs().max()) for key in one)
    # Adam divides by the gradient's size, so float error in tiny gradients is magnified
    assert apart < 1e-3
    assert far > 10 * apart


def test_updates_too_small_for_bfloat16_are_kept_in_the_masters(causal: Path, tmp_path: Path) -> None:
    trainer, live = trainer_for(
        causal, tmp_path, 20, dtype="bfloat16", learning_rate=1e-5, schedule="constant", warmup=0.0, weight_decay=0.0
    )
    assert {parameter.dtype for parameter in live} == {torch.bfloat16}
    target = next(p for p in live if p.abs().min() > 0)
    name = next(name for name, master in trainer.masters.items() if master.shape == target.shape and master.any())
    before = trainer.masters[name].clone()
    trainer.run(lambda _number: (sum(parameter.float().sum() for parameter in live), 1), label="x")
    moved = before - trainer.masters[name]
    # Adam moves by the learning rate where the gradient is constant
    torch.testing.assert_close(moved, torch.full_like(moved, 20 * 1e-5), rtol=0.05, atol=1e-6)
    assert {master.dtype for master in trainer.masters.values()} == {torch.float32}
    assert {parameter.dtype for parameter in live} == {torch.bfloat16}


@pytest.mark.parametrize("schedule", get_args(TaskSettings.model_fields["schedule"].annotation))
@pytest.mark.parametrize(("warmup", "rising"), [(0.0, 0), (0.15, 3), (0.99, 19)])
def test_learning_rates_are_those_of_transformers(
    schedule: str, warmup: float, rising: int, causal: Path, tmp_path: Path
) -> None:
    trainer, live = trainer_for(causal, tmp_path, 20, schedule=schedule, warmup=warmup)
    rates = []

    def loss(_number: int) -> tuple[torch.Tensor, int]:
        rates.append(trainer._optimizer.param_groups[0]["lr"])
        return (live[0] ** 2).sum(), 1

    trainer.run(loss, label="x")
    peak = settings_for(causal, tmp_path).learning_rate
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = get_scheduler(
        {"constant": "constant_with_warmup"}.get(schedule, schedule),
        optimizer,
        rising,
        20,
        scheduler_specific_kwargs={"timescale": max(1, rising)} if schedule == "inverse_sqrt" else None,
    )
    expected = []
    for _ in range(20):
        expected += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    assert rates == pytest.approx(expected)
    assert rates[: rising + 1] == pytest.approx([peak * step / max(1, rising) for step in range(rising)] + [peak])


def test_the_written_adapter_is_that_of_the_masters(causal: Path, tmp_path: Path) -> None:
    train_task(settings_for(causal, tmp_path, dtype="bfloat16", learning_rate=1e-5))
    written = weights(tmp_path / "task")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in written.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 4, 6], ids=["first", "at a checkpoint", "last"])
def test_what_is_not_finite_stops_the_run_before_it_spoils_anything(
    causal: Path, tmp_path: Path, bad: float, where: str, step: int
) -> None:
    trainer, live = trainer_for(causal, tmp_path, 6, checkpoint_every=2)

    def loss(number: int) -> tuple[torch.Tensor, int]:
        value = (live[0].float() ** 2).sum()
        if number + 1 == step:
            value = value * bad if where == "loss" else value + _Spoil.apply(live[0], bad)
        return value, 1

    with refuses(rf"train.not-finite: {where} .*(nan|inf) at step {step}\."):
        trainer.run(loss, label="x")
    assert all(torch.isfinite(master).all() for master in trainer.masters.values())
    path = partial_path(tmp_path / "x") / "checkpoint.safetensors"
    assert path.exists() == (step > 2)
    if path.exists():
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


class _Spoil(torch.autograd.Function):
    """Adds nothing to the loss and something that is not finite to its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, bad: float) -> torch.Tensor:
        ctx.bad, ctx.shape = bad, tensor.shape
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.full(ctx.shape, ctx.bad), None


def test_a_run_that_diverges_at_once_writes_nothing_at_all(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, learning_rate=1e30, warmup=0.0, max_grad_norm=1e30)
    before = contents(tmp_path)
    with refuses("train.not-finite"):
        train_task(settings)
    assert contents(tmp_path) == before


def test_no_global_generator_moves(causal: Path, tmp_path: Path) -> None:
    settings = settings_for(causal, tmp_path, dropout=0.3)
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train_task(settings)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_the_callers_generator_does_not_reach_the_result(causal: Path, tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        train_task(settings_for(causal, tmp_path, dropout=0.3, out=str(tmp_path / str(seed))))
        found.append((tmp_path / str(seed) / WEIGHTS).read_bytes())
    assert found[0] == found[1]


def test_signals_belong_to_the_caller_again_after_training(causal: Path, tmp_path: Path) -> None:
    import signal

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_task(settings_for(causal, tmp_path, steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_runs_in_a_thread_where_signals_cannot_be_caught(causal: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(train_task, settings_for(causal, tmp_path, steps=2)).result(timeout=600)
    assert report.steps == 2


class TestTask:
    def test_different_answers_are_learned_by_heart(self, tmp_path: Path) -> None:
        causal = tiny_causal(tmp_path / "model")
        tensors = weights(causal, "model.safetensors")
        tensors["lm_head.weight"] *= 30  # a random output layer is too weak for a probability near 1
        save_file(tensors, causal / "model.safetensors", metadata={"format": "pt"})
        rows = [("wake me at six", "time", "six"), ("play jazz", "genre", "jazz"), ("go home", "place", "home")]
        data = tmp_path / "some.en.jsonl"
        data.write_text("".join(json.dumps({"text": t, "slots": [{"type": k, "value": v}]}) + "\n" for t, k, v in rows))
        settings = settings_for(causal, tmp_path, train=[str(data)], steps=150, batch_size=3, rank=16)
        history = train_task(settings).history
        assert history[-1]["loss"] < 0.05 * history[0]["loss"]
        found = evaluate(
            EvaluateSettings(
                base=str(causal),
                adapter=settings.out,
                task="slots",
                data=[str(data)],
                max_new_tokens=16,
                dtype="float32",
                device="cpu",
            )
        )
        assert list(found.answers) == [f"{kind}: {value}" for _, kind, value in rows]
        assert found.scores["en"].value == 1.0

    def test_rows_pick_a_part_of_each_file(self, causal: Path, tmp_path: Path) -> None:
        files = [write_slots(tmp_path, "a.en.jsonl"), write_slots(tmp_path, "b.de.jsonl")]
        train_task(settings_for(causal, tmp_path, train=files, rows="1:3", steps=1))
        manifest = json.loads((tmp_path / "task" / "adaptermix.json").read_text())
        assert manifest["languages"] == {"supervised": ["de", "en"]}
        assert manifest["plan"]["rows"] == "1:3"
        dry = settings_for(
            causal, tmp_path, train=files, rows="1:3", steps=None, epochs=1, batch_size=1, out="o", dry_run=True
        )
        assert train_task(dry).steps == 4

    def test_a_long_prompt_loses_its_beginning_and_the_answer_stays_whole(self, causal: Path, tmp_path: Path) -> None:
        base = load_base(str(causal), dtype="float32", device="cpu")
        task, template = get_task("slots"), get_template(get_task("slots"), "plain")
        (tmp_path / "long.en.jsonl").write_text(
            json.dumps({"text": "x" * 99, "slots": [{"type": "time", "value": "six"}]})
        )
        rows, _ = task.read([str(tmp_path / "long.en.jsonl")], rows=None)
        [(prompt, answer)] = encode_rows(task, template, rows, base.tokenizer, max_length=30)
        assert base.tokenizer.decode(answer) == " time: six</s>"
        assert len(prompt) + len(answer) == 30
        assert base.tokenizer.decode(prompt).endswith("x\nSlots:")

    def test_what_opens_a_long_prompt_stays(self, tmp_path: Path) -> None:
        causal = tiny_causal(tmp_path / "model", single="<s> $A")
        tokenizer = load_base(str(causal), dtype="float32", device="cpu").tokenizer
        task, template = get_task("slots"), get_template(get_task("slots"), "plain")
        write_slots(tmp_path)
        rows = task.read([str(tmp_path / "train.en.jsonl")], rows=":1")[0]
        whole = template.encode(task.fields(rows[0]), tokenizer)
        assert tokenizer.convert_ids_to_tokens(whole[:1]) == ["<s>"]
        for most in (10**6, len(whole) + 5, 20, 9, 1):
            [(prompt, answer)] = encode_rows(task, template, rows, tokenizer, max_length=most)
            room = max(1, most - len(answer))
            expected = whole if len(whole) <= room else [whole[0], *whole[len(whole) - room + 1 :]]
            assert prompt == (expected if room > 1 else whole[-1:])

    def test_special_tokens_further_on_are_cut_like_others(self) -> None:
        special = {0, 1, 2}
        assert shortened([1, 2, 7, 0, 8, 9], 4, special) == [1, 2, 8, 9]
        assert shortened([7, 0, 8, 9], 2, special) == [8, 9]
        assert shortened([1, 2, 0, 2], 2, special) == [1, 2]
        assert shortened([1, 2, 8, 9], 1, special) == [9]

    def test_a_dry_run_checks_the_data_and_writes_nothing(self, causal: Path, tmp_path: Path) -> None:
        settings: TaskSettings = settings_for(causal, tmp_path, dry_run=True)
        before = contents(tmp_path)
        assert train_task(settings).document()["dry_run"] is True
        assert contents(tmp_path) == before
