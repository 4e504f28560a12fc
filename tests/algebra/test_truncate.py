"""truncate: near the optimum of Eckart and Young, and honest about how near."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adaptermix.algebra import LowRank, Stack, least_rank, truncate
from adaptermix.methods.base import build

TALL, WIDE = (420, 330), (330, 420)


def spectrum(name: str, n: int) -> Tensor:
    places = torch.arange(n, dtype=torch.float64)
    return {
        "fast": 0.8**places,
        "slow": 1 / (1 + places).sqrt(),
        "clustered at the cut": torch.where(places < 6, 3.0, torch.where(places < 12, 1.0, 0.3)).double(),
        "rank 5": torch.where(places < 5, 1.0, 0.0).double(),
        "tiny tail": torch.where(places < 8, 1.0, 1e-5).double(),
    }[name]


def matrix(name: str, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if name == "noise":
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    if name == "ties":
        parts = [
            LowRank(
                b=torch.randn(shape[0], 8, generator=generator, dtype=torch.float64),
                a=torch.randn(8, shape[1], generator=generator, dtype=torch.float64),
            )
            for _ in range(3)
        ]
        return build("ties", {"density": 0.2})(Stack.of(parts)).dense()
    n = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(shape[1], n, generator=generator, dtype=torch.float64)).Q
    return (u * spectrum(name, n)) @ v.T


KINDS = ["noise", "ties", "fast", "slow", "clustered at the cut", "rank 5", "tiny tail"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 9])
def test_the_residual_is_within_one_percent_and_the_bound_holds(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, rank: int
) -> None:
    w = matrix(kind, shape).to(dtype)
    found = truncate(w, rank)
    sigma = torch.linalg.svdvals(w.double())
    least = float(sigma[rank:].norm() / sigma.norm())
    true = float((w.double() - found.update.to(torch.float64).dense()).norm() / sigma.norm())
    assert found.update.rank == rank
    assert found.update.b.dtype == found.update.a.dtype == dtype
    assert found.residual == pytest.approx(true, rel=1e-3, abs=1e-6)
    rounding = 1e-6 if dtype == torch.float32 else 1e-12
    assert true <= 1.01 * least + rounding
    assert math.isfinite(found.excess)
    assert (true - least) / max(least, 1e-3) <= found.excess + 1e-3 * rounding / 1e-6
    assert found.excess <= (0.01 if least >= 1e-3 else max(1e-3, 1100 * true))


@pytest.mark.parametrize("rank", [50, 60, 1000])
def test_a_rank_at_or_above_the_sides_keeps_everything(rank: int) -> None:
    w = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    found = truncate(w, rank)
    assert found.update.rank == 50
    assert found.residual <= 1e-6
    assert torch.allclose(found.update.dense(), w, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 3), TALL, WIDE])
def test_nothing_is_lost_of_zero(shape: tuple[int, int]) -> None:
    found = truncate(torch.zeros(shape), 2)
    assert (found.residual, found.excess) == (0.0, 0.0)
    assert not found.update.dense().any()
    assert found.update.shape == shape


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(5, 3), TALL, WIDE])
def test_what_is_not_finite_is_refused(shape: tuple[int, int], value: float) -> None:
    w = torch.ones(shape)
    w[-1, -1] = value
    with pytest.raises(ValueError, match="a finite matrix is needed"):
        truncate(w, 2)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        truncate(torch.ones(2, 2), 0)


def test_the_same_matrix_gives_the_same_bytes_and_leaves_the_random_state_alone() -> None:
    w = matrix("fast", TALL)
    one = truncate(w, 9).update
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    other = truncate(w.clone(), 9).update
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.b, other.b)
    assert torch.equal(one.a, other.a)


@pytest.mark.parametrize("keep", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_the_least_rank_holds_the_share_and_one_less_does_not(keep: float) -> None:
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5])
    rank = least_rank(sigma, keep)
    squares = sigma.double().square()
    assert float(squares[:rank].sum()) >= keep * float(squares.sum()) * (1 - 1e-9)
    if rank > 1:
        assert float(squares[: rank - 1].sum()) < keep * float(squares.sum())


def test_the_least_rank_of_nothing_is_one_and_of_a_part_at_most_its_length() -> None:
    assert least_rank(torch.zeros(4), 0.9) == 1
    assert least_rank(torch.tensor([2.0, 1.0]), 0.99, total=100.0) == 2
    assert least_rank(torch.tensor([2.0, 1.0, 0.0]), 1.0) == 2
