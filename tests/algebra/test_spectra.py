"""Singular values of full matrices: the identities that hold for any of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaptermix.algebra.spectra import dense_singular_values, gram, spectral_distance, spectral_norm

from ..strategies import matrices

SIDES = st.integers(1, 6)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two matrices of one shape."""
    rows, columns = draw(SIDES), draw(SIDES)
    return draw(matrices(rows, columns, torch.float64)), draw(matrices(rows, columns, torch.float64))


def orthogonal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("side", [1024, 0], ids=["svd", "gram"])
@given(pairs())
def test_the_norm_of_the_singular_values_is_frobenius(side: int, pair: tuple[Tensor, Tensor]) -> None:
    w, _ = pair
    sigma = dense_singular_values(w, side=side)
    assert sigma.shape == (min(w.shape),)
    assert float(sigma.norm()) == pytest.approx(float(w.norm()), rel=1e-9, abs=1e-12)
    assert bool((sigma[:-1] >= sigma[1:]).all())
    assert bool((sigma >= 0).all())
    assert spectral_norm(w) == pytest.approx(float(sigma[0]), rel=1e-7, abs=1e-9)
    assert torch.allclose(dense_singular_values(w.T, side=side), sigma, rtol=1e-6, atol=1e-6)


@given(pairs())
def test_the_distance_lies_between_the_difference_of_norms_and_mirskys_bound(pair: tuple[Tensor, Tensor]) -> None:
    w, v = pair
    one, other = dense_singular_values(w), dense_singular_values(v)
    d = spectral_distance(one, other)
    rounding = 1e-9 * (1 + float(w.norm() + v.norm()))
    assert d <= float((v - w).norm()) + rounding
    assert d >= abs(float(w.norm() - v.norm())) - rounding
    assert d == spectral_distance(other, one)
    assert spectral_distance(one, one) == 0.0


@given(pairs(), st.integers(0, 99))
def test_the_distance_is_blind_to_rotations(pair: tuple[Tensor, Tensor], seed: int) -> None:
    w, _ = pair
    turned = orthogonal(w.shape[0], seed) @ w @ orthogonal(w.shape[1], seed + 1)
    d = spectral_distance(dense_singular_values(w), dense_singular_values(turned))
    assert d == pytest.approx(0.0, abs=1e-10 * (1 + float(w.norm())))


@given(pairs(), st.sampled_from([0.0, 0.5, -1.0, -2.0, 3.0]))
def test_a_scaled_copy_is_as_far_as_the_scale_says(pair: tuple[Tensor, Tensor], c: float) -> None:
    w, _ = pair
    d = spectral_distance(dense_singular_values(w), dense_singular_values(c * w))
    assert d == pytest.approx(abs(abs(c) - 1) * float(w.norm()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(40, 30), (9000, 3), (3, 9000)])
def test_the_gram_matrix_gives_what_the_svd_gives(shape: tuple[int, int]) -> None:
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(w.double())
    assert torch.allclose(dense_singular_values(w, side=1), exact, rtol=1e-7)
    assert torch.allclose(dense_singular_values(w), exact, rtol=1e-7)
    assert gram(w).shape == (min(shape), min(shape))


def test_lists_of_unequal_length_are_filled_with_zeros() -> None:
    one, other = torch.tensor([5.0, 3.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    assert spectral_distance(one, other) == pytest.approx(18**0.5)
    assert spectral_distance(other[:0], one) == pytest.approx(34**0.5)
