"""Cross-entropy behind a frozen output layer, against float64 and against the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.models.base import load_base
from adaptermix.options import TaskSettings
from adaptermix.training.lora import factors, inject
from adaptermix.training.losses import answer_loss, linear_ce, linear_cross_entropy, plain_head
from adaptermix.training.task import collate
from tests.tiny import tiny_causal


def drawn(tokens: int, width: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    states, weight = (torch.randn(n, width, generator=generator) for n in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return states.requires_grad_(), weight, targets, torch.randn(vocabulary, generator=generator)


@given(tokens=st.integers(1, 40), width=st.integers(1, 9), vocabulary=st.integers(2, 50), biased=st.booleans())
def test_value_and_gradient_equal_float64(tokens: int, width: int, vocabulary: int, biased: bool) -> None:
    states, weight, targets, bias = drawn(tokens, width, vocabulary)
    wide = states.detach().double().requires_grad_()
    logits = wide @ weight.double().T + (bias.double() if biased else 0)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    found = linear_cross_entropy(states, weight, targets, bias if biased else None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * found).backward()  # type: ignore[no-untyped-call]
    (3 * expected).backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    torch.testing.assert_close(states.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


def test_blocks_of_tokens_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, targets, _ = drawn(53, 8, 30)
    whole = linear_cross_entropy(states, weight, targets)
    whole.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    slope, states.grad = states.grad, None
    monkeypatch.setattr(linear_ce, "_CPU_LOGITS", 1)  # blocks of 16
    parts = linear_cross_entropy(states, weight, targets)
    parts.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(states.grad, slope)


def test_half_precision_differs_from_float32_by_its_rounding_only() -> None:
    states, weight, targets, _ = drawn(20, 16, 30)
    half = states.detach().bfloat16().requires_grad_()
    found = linear_cross_entropy(half, weight.bfloat16(), targets)
    theirs = torch.nn.functional.cross_entropy((half @ weight.bfloat16().T).float(), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, theirs)
    slopes = [torch.autograd.grad(loss, half)[0] for loss in (found, theirs)]
    torch.testing.assert_close(*slopes, rtol=2e-2, atol=1e-3)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    states, weight, targets, _ = drawn(5, 4, 6)
    with torch.no_grad():
        assert not linear_cross_entropy(states, weight, targets).requires_grad


def lora(path: Path, kind: str, **changes: Any) -> Any:
    base = load_base(str(tiny_causal(path, kind)), dtype="float32", device="cpu")
    settings = TaskSettings(base="-", task="slots", train=["-"], out="-", dropout=0.0)
    for name, value in changes.items():
        setattr(base.model.config, name, value)
    inject(base.model, settings, seed=0)
    with torch.no_grad():
        for factor in factors(base.model).values():
            factor.normal_(std=0.3)
    return base.model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_a_plain_head_gives_the_loss_and_the_gradients_of_the_model(kind: str, tmp_path: Path) -> None:
    model = lora(tmp_path, kind)
    head = plain_head(model)
    assert head is model.get_output_embeddings()
    batch = collate([([5, 6, 7, 8], [9, 10, 2]), ([11], [12, 2]), ([5], [7, 8, 9, 10, 2])], 0, torch.device("cpu"))
    found = {}
    for name, loss in (("ours", answer_loss(model, **batch, head=head)), ("theirs", model(**batch).loss)):
        loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in factors(model).values())]
        model.zero_grad()
    torch.testing.assert_close(found["ours"], found["theirs"], rtol=1e-4, atol=1e-6)


def test_a_head_whose_output_is_bounded_afterwards_is_not_plain(tmp_path: Path) -> None:
    assert plain_head(lora(tmp_path, "gemma3", final_logit_softcapping=0.5)) is None


def test_under_autocast_it_is_what_a_linear_layer_and_torch_make(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, targets, bias = drawn(40, 16, 30)
    theirs = states.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(states, weight, targets, bias)
        logits = torch.nn.functional.linear(theirs, weight, bias)
        expected = torch.nn.functional.cross_entropy(logits.float(), targets)
    assert logits.dtype == torch.bfloat16
    found.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert states.grad is not None
    assert states.grad.dtype == torch.float32
    torch.testing.assert_close(states.grad, theirs.grad, rtol=5e-2, atol=2e-3)
