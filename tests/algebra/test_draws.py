"""Random numbers are a function of their key and position, uniform, and unrelated to those of other keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adaptermix.algebra.draws import uniform

COUNT = 100_000
KEYS = [(0, "task", "m"), (1, "task", "m"), (0, "align", "m"), (0, "task", "n"), (2**40, "task", "m"), (-1, "", "")]


def drawn(key: tuple[int, str, str], count: int = COUNT, first: int = 0) -> Tensor:
    return uniform(*key, first=first, shape=(count,)).double()


@pytest.mark.parametrize(
    ("key", "first", "expected"),
    [
        ((0, "task", "m"), 0, [13310513, 5254832, 3005798, 10391651]),
        ((1, "task", "m"), 0, [11298736, 8028223, 16441060, 8939527]),
        ((0, "align", "m"), 0, [8119144, 2264145, 15869891, 5825027]),
        ((0, "task", "layers.0.q"), 10**6, [428620, 10161029, 1729909, 3155668]),
        ((2**40, "é", ""), 2**31 - 2, [9102769, 4680802, 9054834, 5197084]),
    ],
)
def test_the_numbers_are_those_of_the_first_release(key: tuple[int, str, str], first: int, expected: list[int]) -> None:
    """Whoever repeats a merge with a seed must get the same masks."""
    assert (drawn(key, 4, first) * 2**24).tolist() == expected


@pytest.mark.parametrize("key", KEYS)
def test_they_are_uniform(key: tuple[int, str, str]) -> None:
    values = drawn(key)
    assert 0 <= float(values.min()) <= float(values.max()) < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    chi = float(((counts - COUNT / 100) ** 2 / (COUNT / 100)).sum())
    assert 50 < chi < 170  # 99 degrees of freedom
    steps = torch.arange(1, COUNT + 1) / COUNT
    assert float((values.sort().values - steps).abs().max()) < 2 / math.sqrt(COUNT)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("lag", [1, 2, 64, 4096])
def test_neighbours_are_unrelated(key: tuple[int, str, str], lag: int) -> None:
    values = drawn(key) - 0.5
    assert abs(float((values[lag:] * values[:-lag]).mean())) * 12 < 5 / math.sqrt(COUNT)


def test_other_seeds_adapters_and_modules_are_unrelated() -> None:
    rows = torch.stack([drawn(key) - 0.5 for key in KEYS])
    related = (rows @ rows.T / COUNT * 12).fill_diagonal_(0)
    assert float(related.abs().max()) < 5 / math.sqrt(COUNT)
    both = (rows[0] < 0) & (rows[1] < 0)
    assert abs(float(both.double().mean()) - 0.25) < 0.01


@pytest.mark.parametrize("split", [1, 7, 4096, 99_999])
def test_the_place_of_a_block_does_not_matter(split: int) -> None:
    whole = drawn(KEYS[0])
    assert torch.equal(whole, torch.cat([drawn(KEYS[0], split), drawn(KEYS[0], COUNT - split, split)]))


def test_a_shape_is_filled_in_row_order() -> None:
    assert torch.equal(
        uniform(0, "a", "m", first=0, shape=(3, 4)).flatten(), uniform(0, "a", "m", first=0, shape=(12,))
    )
