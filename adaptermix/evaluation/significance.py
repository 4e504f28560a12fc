"""Significance of systems' gains over a baseline, corrected for the number of comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.float64]
"""Values of one quantity: on the original rows, then on the resamples [1 + resamples]."""


def null_error(gains: NDArray[np.float64], units: float) -> float:
    """Return the standard error of a gain under the null hypothesis: the spread of its resamples about 0.

    The spread about the gain is too small if few rows differ, and 0 if all rows have the same gain.

    Args:
        gains: The gain, then its resamples. [1 + resamples]
        units: Rows, or clusters of rows, that were resampled; see `units_of_mean`.
    """
    return math.sqrt(float(gains[1:].var()) + float(gains[0]) ** 2 / max(units, 1))


def p_value(gains: NDArray[np.float64], units: float) -> float:
    """Return the two-sided p-value of a gain by Student's t distribution, with its error as in `null_error`.

    For accuracy this is close to McNemar's exact test, including for few rows.

    Args:
        gains: The gain, then its resamples. [1 + resamples]
        units: Rows, or clusters of rows, that were resampled; fewer than two carry no information.
    """
    from scipy.special import stdtr  # type: ignore[import-untyped]

    error = null_error(gains, units)
    return 2 * float(stdtr(units - 1, -abs(float(gains[0])) / error)) if error > 0 and units >= 2 else 1.0


def units_of_mean(units: Sequence[int]) -> float:
    """Return the effective number of units of a mean over languages, if row i is hard or easy in all of them.

    Example:
        >>> round(units_of_mean([12, 12, 12]), 6), round(units_of_mean([4, 400]), 1)
        (12.0, 13.2)
    """
    return 1 / float(np.mean([1 / math.sqrt(count) for count in units])) ** 2


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, so that the chance of any false finding stays below the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Reference: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def p_values(
    languages: Mapping[str, Draws], groups: Mapping[str, Draws], whole: int, units: Mapping[str, int], baseline: str
) -> dict[str, dict[str, float]]:
    """Return for each other system the corrected p-values of its gains over the baseline, by language and for all.

    Args:
        languages: For each system the scores of the languages. [languages 1 + resamples]
        groups: For each system the means over groups. [groups 1 + resamples]
        whole: Index of the group of all languages.
        units: Rows, or clusters of rows, of each language.
        baseline: Name of the baseline.
    """
    others = [name for name in languages if name != baseline]
    count, every = list(units.values()), units_of_mean(list(units.values()))
    means = holm([p_value(groups[name][whole] - groups[baseline][whole], every) for name in others])
    gaps = [languages[name] - languages[baseline] for name in others]
    each = iter(holm([p_value(row, count[index]) for gap in gaps for index, row in enumerate(gap)]))
    return {name: {"all": mean} | {key: next(each) for key in units} for name, mean in zip(others, means, strict=True)}
