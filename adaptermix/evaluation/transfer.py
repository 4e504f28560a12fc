"""The correlation of retrieval with transfer over languages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, PlanError

_SHUFFLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Pearson's and Spearman's coefficients over languages.

    Args:
        pearson: Coefficient of the values.
        spearman: Coefficient of their ranks.
        p: Share of 10,000 shuffles whose Pearson coefficient has at least the same size.
        languages: The languages.
    """

    pearson: float
    spearman: float
    p: float
    languages: tuple[str, ...]


def read_scores(path: Path) -> dict[str, float]:
    """Read the transfer languages' scores from the JSON document of `adaptermix evaluate`.

    Raises:
        DataError: it is not such a document.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        supervised = set(document.get("roles", {}).get("supervised", ()))
        scores = {name: float(score["value"]) for name, score in document["scores"].items() if name not in supervised}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} must be the output of 'adaptermix evaluate --json', with scores of languages, and is not.",
            code="transfer.not-scores",
        ) from error
    return scores


def correlate(retrieval: Mapping[str, float], scores: Mapping[str, float]) -> Correlation:
    """Correlate retrieval with scores over the languages that have both (figure 1b of arXiv 2502.14830).

    Raises:
        PlanError: fewer than three languages have both, or all values of one side are the same.
    """
    languages = tuple(sorted(set(retrieval) & set(scores)))
    if len(languages) < 3:
        both, near, far = (", ".join(sorted(names)) or "none" for names in (languages, retrieval, scores))
        raise PlanError(
            f"a correlation needs three languages with retrieval and a transfer score, found {both} (retrieval: "
            f"{near}, scores: {far}).",
            code="transfer.too-few",
        )
    x, y = (np.array([side[name] for name in languages]) for side in (retrieval, scores))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise PlanError(
            "a correlation needs values that differ, and retrieval or the scores are all the same.",
            code="transfer.constant",
        )
    pearson = float(np.corrcoef(x, y)[0, 1])
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(y, (_SHUFFLES, 1)), axis=1)
    z = (x - x.mean()) / x.std()
    drawn = ((shuffled - y.mean()) / y.std() @ z) / len(x)
    return Correlation(
        pearson=pearson,
        spearman=float(np.corrcoef(_ranks(x), _ranks(y))[0, 1]),
        p=float(((np.abs(drawn) >= abs(pearson) - 1e-12).sum() + 1) / (_SHUFFLES + 1)),
        languages=languages,
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share their mean rank."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    ranks: NDArray[np.float64] = below + (equal - 1) / 2
    return ranks
