"""p-values of systems against a baseline, and their correction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from adaptermix import CompareSettings, compare_systems
from adaptermix.evaluation.significance import holm, p_value


def test_holm_is_worked_by_hand():
    # sorted .01 .02 .03 .04: times 4, 3, 2, 1 is .04 .06 .06 .04, made monotone .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_p_value_of_many_rows_is_that_of_the_normal_distribution():
    rng = np.random.default_rng(0)
    gains = np.concatenate([[0.02], rng.normal(0.02, 0.01, 100_000)])
    assert p_value(gains, 10_000) == pytest.approx(2 * stats.norm.sf(2.0), rel=0.02)
    assert p_value(-gains, 10_000) == pytest.approx(p_value(gains, 10_000))
    assert p_value(np.zeros(1001), 10_000) == 1.0
    assert p_value(gains, 1) == 1.0


def compared(tmp_path: Path, rights: dict[str, np.ndarray]):
    rows = len(next(iter(rights.values())))
    (tmp_path / "en.jsonl").write_text(
        "".join(json.dumps({"text": f"t{n}", "label": "ab"[n % 2]}) + "\n" for n in range(rows))
    )
    systems = []
    for name, right in rights.items():
        lines = [json.dumps({"answer": "ab"[n % 2] if hit else "ab"[1 - n % 2]}) + "\n" for n, hit in enumerate(right)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        systems.append(f"{name}={tmp_path / name}.jsonl")
    return compare_systems(
        CompareSettings(systems=systems, task="classify", data=[str(tmp_path / "en.jsonl")], baseline="base")
    )


def gained_and_lost() -> tuple[np.ndarray, np.ndarray]:
    """Right answers of two systems on 400 rows, of which the second gains 40 and loses 20."""
    base = np.arange(400) < 300
    other = base.copy()
    other[:20] = False
    other[300:340] = True
    return base, other


def test_the_p_value_of_a_comparison_is_near_that_of_mcnemar(tmp_path: Path):
    """40 rows gained and 20 lost of 400: McNemar's z is 20 / sqrt(60)."""
    base, other = gained_and_lost()
    found = compared(tmp_path, {"base": base, "other": other}).systems[1]
    assert found.above["all"].value == pytest.approx(0.05)
    assert stats.norm.isf(found.p_values["all"] / 2) == pytest.approx(20 / 60**0.5, rel=0.06)
    assert found.p_values["en"] == pytest.approx(found.p_values["all"])
    assert found.above_languages["en"].value == pytest.approx(0.05)


@pytest.mark.parametrize(("rows", "gained"), [(5, 5), (12, 6), (12, 4), (12, 12), (30, 9)])
def test_few_rows_have_the_p_value_of_the_exact_test_and_an_interval_with_a_width(
    rows: int, gained: int, tmp_path: Path
):
    """All rows that differ are gains, so the resamples vary little or not at all."""
    base = np.arange(rows) >= gained
    found = compared(tmp_path, {"base": base, "other": np.ones(rows, dtype=bool)}).systems[1]
    exact = stats.binomtest(gained, gained).pvalue  # McNemar's exact test; half of it is its mid-p value
    assert exact / 2 < found.p_values["all"] < max(1.6 * exact, 0.01)
    # Agresti and Min's interval: half a row for each way in which two answers can differ
    more, less, n = gained + 0.5, 0.5, rows + 2
    width = 1.96 * (((more + less) - (more - less) ** 2 / n) / n**2) ** 0.5
    for gain in (found.above["all"], found.above_languages["en"]):
        assert gain.value == pytest.approx(gained / rows)
        assert gain.low == pytest.approx((more - less) / n - width, abs=0.02)
    # Agresti and Coull's: two rows right, two wrong
    p, n = (rows + 2) / (rows + 4), rows + 4
    for score in (found.languages["en"], found.groups["all"]):
        assert (score.value, score.high) == (1.0, 1.0)
        assert score.low == pytest.approx(p - 1.96 * (p * (1 - p) / n) ** 0.5, abs=0.02)


def test_more_systems_make_a_finding_less_likely(tmp_path: Path):
    base, other = gained_and_lost()
    alone = compared(tmp_path, {"base": base, "other": other}).systems[1]
    rng = np.random.default_rng(0)
    # ten systems that differ from the baseline in forty rows, as often for the better as for the worse
    noise = {
        f"n{i}": base ^ np.isin(np.arange(400), [*rng.choice(300, 20, False), *rng.choice(100, 20, False) + 300])
        for i in range(10)
    }
    many = compared(tmp_path, {"base": base, "other": other, **noise})
    assert many.systems[1].p_values["all"] == pytest.approx(11 * alone.p_values["all"])
    assert alone.p_values["all"] < 0.05 < many.systems[1].p_values["all"]
    titles, rows = many.table()
    assert "p" in titles
    assert not any(cell.endswith("*") for row in rows for cell in row)
    assert compared(tmp_path, {"base": base, "other": other}).table()[1][1][-1].endswith("*")
