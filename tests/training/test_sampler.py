"""Which rows belong to which batch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from adaptermix.training.sampler import Sampler

sizes = st.lists(st.integers(1, 7), min_size=1, max_size=4)


def groups_of(counts: list[int]) -> list[list[int]]:
    """Consecutive row numbers."""
    edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [list(range(start, stop)) for start, stop in pairwise(edges)]


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
def test_every_row_comes_once_per_pass_whatever_the_batch_size(rows: int, batch_size: int, seed: int) -> None:
    sampler = Sampler(groups=[range(rows)], batch_size=batch_size, seed=seed)
    stream = [row for number in range(rows * 3) for row in sampler.batch(number)]
    for start in range(0, rows * 3, rows):
        assert sorted(stream[start : start + rows]) == list(range(rows))


@given(sizes, st.integers(0, 99))
def test_groups_take_turns_and_within_one_every_row_comes_once_per_pass(counts: list[int], seed: int) -> None:
    groups = groups_of(counts)
    sampler = Sampler(groups=groups, batch_size=len(groups), seed=seed)
    rounds = [sampler.batch(number) for number in range(2 * max(counts))]
    for drawn in rounds:
        assert sorted(next(i for i, group in enumerate(groups) if row in group) for row in drawn) == list(
            range(len(groups))
        )
    for group in groups:
        own = [row for drawn in rounds for row in drawn if row in group]
        assert set(Counter(own[: len(group)]).values()) == {1}
        assert sorted(own[: len(group)]) == group


@given(sizes, st.integers(1, 5), st.integers(0, 99), st.integers(0, 40))
def test_any_batch_can_be_had_without_those_before_it(
    counts: list[int], batch_size: int, seed: int, number: int
) -> None:
    made = [Sampler(groups=groups_of(counts), batch_size=batch_size, seed=seed) for _ in range(2)]
    walked = [made[0].batch(i) for i in range(number + 1)]
    assert walked[number] == made[1].batch(number)
    assert len(walked[number]) == batch_size


def test_passes_groups_and_seeds_are_shuffled_apart() -> None:
    sampler, other = (Sampler(groups=[range(50)], batch_size=50, seed=seed) for seed in (1, 2))
    assert len({tuple(batch) for batch in (sampler.batch(0), sampler.batch(1), other.batch(0), range(50))}) == 4
    twins = Sampler(groups=[range(50), range(50, 100)], batch_size=100, seed=1).batch(0)
    assert [row for row in twins if row < 50] != [row - 50 for row in twins if row >= 50]


def test_no_group_always_opens_a_round() -> None:
    sampler = Sampler(groups=[[0], [1], [2]], batch_size=3, seed=0)
    assert {sampler.batch(number)[0] for number in range(30)} == {0, 1, 2}


def test_the_order_is_the_same_on_every_machine() -> None:
    """Resumed and repeated runs depend on it: a change here changes every trained adapter."""
    assert Sampler(groups=[range(8)], batch_size=8, seed=0).batch(0) == [6, 7, 3, 1, 0, 2, 5, 4]


class TestSampler:
    def test_every_row_comes_once_per_pass(self) -> None:
        sampler = Sampler(groups=[range(10)], batch_size=5, seed=3)
        assert sorted(sampler.batch(0) + sampler.batch(1)) == list(range(10))
        assert sorted(sampler.batch(2) + sampler.batch(3)) == list(range(10))
        assert sampler.batch(0) != sampler.batch(2)

    def test_groups_come_equally_often_whatever_their_size(self) -> None:
        sampler = Sampler(groups=[range(100), [100, 101], [102]], batch_size=9, seed=0)
        rows = [row for number in range(10) for row in sampler.batch(number)]
        assert [sum(row < 100 for row in rows), sum(row in (100, 101) for row in rows), rows.count(102)] == [30, 30, 30]

    def test_batches_are_a_function_of_the_seed_and_the_number(self) -> None:
        one, other = (Sampler(groups=[range(50)], batch_size=8, seed=seed) for seed in (1, 2))
        assert one.batch(4) == Sampler(groups=[range(50)], batch_size=8, seed=1).batch(4)
        assert one.batch(4) != other.batch(4)
