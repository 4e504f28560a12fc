"""FastDropout: what it drops, keeps and leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adaptermix.training.dropout import FastDropout, quicken


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_the_mean_is_kept(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 1000)
    y = FastDropout(p)(x)
    error = 5 * math.sqrt(p * (1 - p) / x.numel())  # five standard errors
    assert abs((y == 0).double().mean().item() - p) < error
    assert set(y.unique().tolist()) == {0.0, y.max().item()}
    # kept entries make up for the dropped ones exactly, at p rounded to 16 bits
    assert y.max().item() * (1 - round(p * 65536) / 65536) == pytest.approx(1, abs=1e-6)


def test_neighbouring_entries_are_dropped_independently():
    """Four entries come of one draw of 64 bits."""
    torch.manual_seed(0)
    dropped = (FastDropout(0.3)(torch.ones(400_000)) == 0).view(-1, 4).double()
    together = torch.corrcoef(dropped.T) - torch.eye(4)
    assert together.abs().max() < 5 / math.sqrt(len(dropped))


def test_a_seed_makes_the_mask():
    x = torch.randn(7, 5, 3)
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(FastDropout(0.5)(x))
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], FastDropout(0.5)(x))


def test_the_gradient_is_the_mask():
    x = torch.randn(6, 5, dtype=torch.bfloat16, requires_grad=True)
    y = FastDropout(0.5)(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0).bfloat16())


def test_views_and_empty_tensors_have_masks_too():
    assert FastDropout(0.5)(torch.empty(0, 4)).shape == (0, 4)
    x = torch.ones(4, 6).T
    assert set(FastDropout(0.5)(x).unique().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("layer", [FastDropout(0.5).eval(), FastDropout(0.0), FastDropout(1e-9)])
def test_evaluation_and_no_dropout_change_nothing(layer):
    x = torch.randn(4, 4)
    assert torch.equal(layer(x), x)


def test_all_is_dropped_where_p_is_one():
    assert not FastDropout(1.0)(torch.ones(9)).any()


def test_the_dropout_of_a_lora_is_replaced_and_no_other():
    model = nn.ModuleDict({"dropout": nn.Dropout(0.1), "q": nn.Module()})
    model["q"].lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.2), "plain": nn.Identity()})
    quicken(model)
    assert type(model["dropout"]) is nn.Dropout
    assert type(model["q"].lora_dropout["default"]) is FastDropout
    assert model["q"].lora_dropout["default"].p == 0.2
    assert type(model["q"].lora_dropout["plain"]) is nn.Identity
