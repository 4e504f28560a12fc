"""Scores and their intervals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.evaluation.run import group_scores
from adaptermix.evaluation.score import Score, mean_score
from adaptermix.evaluation.score import paired_difference as difference
from adaptermix.tasks import Counts

from ..refusals import refuses
from ..scoring import F1, micro_f1


def macro_f1(languages: list[list[Counts]]) -> Score:
    return mean_score(F1, languages)


def paired_difference(first: list[list[Counts]], second: list[list[Counts]]) -> Score:
    return difference(F1, first, second)


counts = st.lists(st.builds(Counts, *[st.integers(0, 5)] * 3), min_size=1, max_size=12)


def plain_f1(rows: list[Counts]) -> float:
    hit, spurious, missed = (sum(row[i] for row in rows) for i in range(3))
    return 1.0 if hit + spurious + missed == 0 else 2 * hit / (2 * hit + spurious + missed)


@given(counts)
def test_micro_f1_equals_the_plain_formula_and_lies_in_its_interval(rows: list[Counts]) -> None:
    score = micro_f1(rows)
    assert score.value == pytest.approx(plain_f1(rows))
    assert 0 <= score.low <= score.high <= 1
    assert score.n == len(rows)
    assert score == micro_f1(rows)


@given(st.lists(counts, min_size=1, max_size=3))
def test_macro_f1_is_the_mean_over_languages(languages: list[list[Counts]]) -> None:
    expected = sum(map(plain_f1, languages)) / len(languages)
    assert macro_f1(languages).value == pytest.approx(expected)


def test_the_interval_narrows_with_rows() -> None:
    few, many = (micro_f1([Counts(1, 0, 0), Counts(0, 1, 1)] * n) for n in (5, 500))
    assert many.high - many.low < (few.high - few.low) / 3
    assert few.low < 0.5 < few.high


def test_no_rows_are_refused() -> None:
    with refuses("score.no-rows"):
        micro_f1([])


def test_a_system_does_not_differ_from_itself() -> None:
    rows = [[Counts(1, 0, 1), Counts(0, 2, 1), Counts(3, 0, 0)]]
    found = paired_difference(rows, rows)
    assert (found.value, found.n) == (0.0, 3)
    # three rows that happen to agree leave doubt, in both directions alike; three hundred leave little
    assert found.low < 0 < found.high
    assert found.high == pytest.approx(-found.low, rel=0.2)
    many = paired_difference([rows[0] * 100], [rows[0] * 100])
    assert -0.02 < many.low <= 0 <= many.high < 0.02


def test_a_better_system_is_told_from_a_worse_one() -> None:
    worse = [[Counts(1, 0, 1), Counts(0, 1, 1)] * 20]
    better = [[Counts(2, 0, 0), Counts(0, 1, 1)] * 20]
    found = paired_difference(worse, better)
    assert found.low > 0
    assert found.value == pytest.approx(plain_f1(better[0]) - plain_f1(worse[0]))


def test_other_rows_are_refused() -> None:
    with refuses("score.rows-differ"):
        paired_difference([[Counts(1, 0, 0)]], [[Counts(1, 0, 0)] * 2])


def test_groups_put_every_language_in_one_role() -> None:
    right, wrong = Counts(1, 0, 0), Counts(0, 1, 1)
    rows = {"en": [right] * 2, "de": [right, wrong], "tr": [wrong] * 2}
    found = group_scores(F1, rows, {"supervised": ["en"], "aligned": ["de", "en"]}, seed=0)
    values = {role: score.value for role, score in found.items()}
    assert values == {"supervised": 1.0, "aligned": 0.5, "transfer": 0.0, "all": 0.5}
    assert {role: score.n for role, score in found.items()} == {"supervised": 2, "aligned": 2, "transfer": 2, "all": 6}
    # the mean of three languages is surer than one of them
    assert found["all"].high - found["all"].low < found["aligned"].high - found["aligned"].low


@given(counts, st.integers(0, 100))
def test_the_interval_contains_the_value_and_follows_the_seed(rows: list[Counts], seed: int) -> None:
    score = micro_f1(rows, seed=seed)
    assert score.low <= score.value <= score.high
    assert score == micro_f1(rows, seed=seed)


def test_other_seeds_draw_other_rows() -> None:
    rows = [Counts(hit, 1, 2) for hit in range(7)]
    found = [micro_f1(rows, seed=seed) for seed in range(5)]
    assert len({score.value for score in found}) == 1
    assert len({(score.low, score.high) for score in found}) > 1


@pytest.mark.parametrize(
    ("row", "value"),
    [((0, 0, 0), 1.0), ((0, 1, 0), 0.0), ((0, 0, 1), 0.0), ((3, 0, 0), 1.0), ((1, 1, 1), 0.5), ((2, 1, 0), 0.8)],
)
def test_one_row_scores_as_it_is(row: tuple[int, int, int], value: float) -> None:
    """(0, 0, 0): nothing was to be found and nothing was."""
    score = micro_f1([Counts(*row)])
    assert (score.value, score.n) == (value, 1)
    # one row says little
    assert score.low <= value <= score.high
    assert score.high - score.low > 0.15


def test_the_interval_is_that_of_resampled_rows() -> None:
    """Hits of independent rows with as many misses: the share of hits is binomial, its quantiles known."""
    score = micro_f1([Counts(1, 0, 0), Counts(0, 1, 1)] * 50)
    # 2.5 % quantiles of Binomial(100, 0.5) / 100
    assert score.low == pytest.approx(0.40, abs=0.02)
    assert score.high == pytest.approx(0.60, abs=0.02)


def test_languages_count_the_same_whatever_their_rows() -> None:
    found = macro_f1([[Counts(1, 0, 0)], [Counts(0, 1, 1)] * 99])
    assert (found.value, found.n) == (0.5, 100)
    with refuses("score.no-rows"):
        macro_f1([[Counts(1, 0, 0)], []])


def test_a_document_is_plain_data() -> None:
    document = micro_f1([Counts(1, 1, 1), Counts(0, 0, 0)]).document()
    assert list(document) == ["value", "low", "high", "n"]
    assert [type(value) for value in document.values()] == [float, float, float, int]


def test_groups_without_languages_are_left_out() -> None:
    rows = {"tr": [Counts(1, 0, 0)]}
    assert list(group_scores(F1, rows, {}, seed=0)) == ["all"]
    assert list(group_scores(F1, rows, {"aligned": ["de"], "supervised": ["tr"]}, seed=0)) == ["supervised", "all"]
