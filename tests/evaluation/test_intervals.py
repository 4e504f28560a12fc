"""Intervals of scores cover what they claim: few rows, rows that come in clusters, perfect answers."""

from __future__ import annotations

import numpy as np
import pytest

from adaptermix.evaluation.score import (
    RowStatistics,
    cluster_sums,
    count_rows,
    draws,
    mean_score,
    paired_difference,
    resampled_counts,
)
from adaptermix.tasks.labels import macro_f1
from adaptermix.tasks.metrics import Metric, f1_ends, mean, mean_ends, micro_f1

ACCURACY = Metric(name="accuracy", count=lambda row, answer: (float(answer == row), 1.0), value=mean, ends=mean_ends)
F1 = Metric(name="f1", count=lambda row, _: row, value=micro_f1, ends=f1_ends)


def right(hits):
    return [(float(hit), 1.0) for hit in hits]


@pytest.mark.parametrize("rows", [12, 30])
@pytest.mark.parametrize("accuracy", [0.5, 0.8, 0.9, 0.97])
def test_accuracy_of_few_rows_is_covered(rows, accuracy):
    """The interval depends on the count of right answers alone, so coverage is a sum over the binomial distribution."""
    from scipy.stats import binom

    covered = 0.0
    for hits in range(rows + 1):
        found = mean_score(ACCURACY, [right([True] * hits + [False] * (rows - hits))])
        covered += binom.pmf(hits, rows, accuracy) * (found.low <= accuracy <= found.high)
    assert covered >= 0.93


def test_perfect_answers_leave_doubt():
    found = mean_score(ACCURACY, [right([True] * 12)])
    assert found.value == found.high == 1.0
    # Wilson's interval for 12 of 12 begins at .757, Agresti and Coull's at .72
    assert 0.65 < found.low < 0.8
    none = mean_score(ACCURACY, [right([False] * 12)])
    assert (none.low, none.value) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - found.low, abs=0.07)


def test_many_rows_have_the_interval_of_the_normal_distribution():
    hits = np.arange(2000) % 10 < 7
    found = mean_score(ACCURACY, [right(hits)])
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 2000), rel=0.06)


@pytest.mark.parametrize("correlation", [0.33, 0.59])
def test_clustered_rows_are_covered(correlation):
    """48 texts with 5 questions each: what makes a text hard is shared by its questions."""
    rng = np.random.default_rng(0)
    clusters = [str(number) for number in np.repeat(np.arange(48), 5)]
    covered, blind = 0, 0
    for _ in range(400):
        # a text's own accuracy is 1 or 0 by a coin of .7 with this probability, else that of all
        shared = np.repeat(np.where(rng.random(48) < correlation, rng.random(48) < 0.7, np.nan), 5)
        hits = np.where(np.isnan(shared), rng.random(240) < 0.7, shared)
        found = mean_score(ACCURACY, [RowStatistics(right(hits), clusters)])
        covered += found.low <= 0.7 <= found.high
        plain = mean_score(ACCURACY, [right(hits)])
        blind += plain.low <= 0.7 <= plain.high
    assert covered / 400 >= 0.92
    assert blind / 400 < 0.88


def test_f1_of_perfect_rows_leaves_doubt_and_nothing_to_find_is_no_division_by_zero():
    found = mean_score(F1, [[(2.0, 0.0, 0.0)] * 10])
    assert found.value == found.high == 1.0
    assert 0.5 < found.low < 0.9
    nothing = mean_score(F1, [[(0.0, 0.0, 0.0)] * 10])
    assert nothing.value == 1.0
    assert nothing.low < 0.9


def test_two_systems_that_answer_alike_may_still_differ():
    found = paired_difference(ACCURACY, [right([True] * 12)], [right([True] * 12)])
    assert found.value == 0
    assert found.low < 0 < found.high
    # one discordant pair of each kind in 14: about 2 / 14
    assert found.high == pytest.approx(2 / 14, abs=0.08)


def test_ends_of_f1_are_worked_by_hand():
    best, worst = f1_ends(np.array([1.0, 0.5, 0.5]))
    assert best.tolist() == [1.5, 0.0, 0.0]
    assert worst.tolist() == [0.0, 1.5, 1.5]
    assert micro_f1(best) == 1.0
    assert micro_f1(worst) == 0.0
    best, worst = f1_ends(np.array([0.5, 0.0, 0.0, 0.25, 0.1, 0.25]))
    assert macro_f1(best) == pytest.approx(1.0)
    assert macro_f1(worst) == 0.0


def test_clusters_are_summed_before_they_are_drawn():
    rows = RowStatistics([(1.0, 1.0), (0.0, 1.0), (1.0, 1.0)], ["a", "b", "a"])
    assert cluster_sums([rows]).tolist() == [[[2.0, 2.0], [0.0, 1.0]]]
    values = draws(ACCURACY, [rows], seed=0)[0]
    assert values[0] == pytest.approx(2 / 3)
    # two clusters: both rows of a always come together
    assert set(np.round(values[1:], 6)) <= {1.0, 0.0, round(2 / 3, 6)}


def test_rows_that_cannot_be_scored_leave_their_clusters_too():
    metric = Metric(name="m", count=lambda row, _: None if row is None else (row, 1.0), value=mean)
    found = count_rows(metric, ["en"] * 3, [1.0, None, 0.0], [""] * 3, ["a", "b", "c"])
    assert found["en"] == [(1.0, 1.0), (0.0, 1.0)]
    assert found["en"].clusters == ["a", "c"]


def test_questions_on_one_text_are_a_cluster_of_their_language():
    from adaptermix.tasks import clusters_of, get_task
    from adaptermix.tasks.nli import NliRow
    from adaptermix.tasks.qa import QaRow

    qa = get_task("qa")
    rows = [
        QaRow(question=f"{number}?", context=text, answers=("a",), language=language)
        for language in ("de", "en")
        for text in ("one", "two")
        for number in range(2)
    ]
    assert clusters_of(qa, rows) == ["one", "one", "two", "two"] * 2
    assert clusters_of(qa, rows[::2]) is None
    nli = get_task("nli")
    rows = [NliRow(premise="p", hypothesis=text, label="neutral", language="en") for text in ("a", "b", "c")]
    assert clusters_of(nli, rows) == ["p"] * 3
    assert clusters_of(get_task("classify"), []) is None


def test_evaluation_resamples_questions_with_their_text():
    from adaptermix.evaluation.run import score_answers
    from adaptermix.tasks import get_task
    from adaptermix.tasks.qa import QaRow

    rows = [
        QaRow(question=f"{number}?", context=f"text {number // 5}", answers=("a",), language="en")
        for number in range(100)
    ]
    apart = [QaRow(question=row.question, context=row.question, answers=("a",), language="en") for row in rows]
    answers = ["a" if number // 5 % 2 else "b" for number in range(100)]
    together, alone = (
        score_answers(get_task("qa"), given, answers, {}, seed=0).scores["en"] for given in (rows, apart)
    )
    assert together.value == alone.value == 0.5
    # texts are wholly right or wrong: 20 observations, not 100
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(5**0.5, rel=0.15)


def test_languages_of_unlike_size_are_drawn_apart_and_those_of_like_size_alike():
    """The stream of draws is that of the seed and of the number of rows: published intervals depend on it."""
    for rows in (8, 9):
        stream = np.random.default_rng((3, rows))
        expected = stream.multinomial(rows, [1 / rows] * rows, size=1000)
        assert resampled_counts(rows, 3)[0].tolist() == [1.0] * rows
        assert resampled_counts(rows, 3)[1:].tolist() == expected.tolist()
