"""Tables over several data sets: one column each, from the documents of `compare`, and their mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError, UsageError
from .score import Score

Column = Mapping[str, Score]
"""Mean over languages of each system."""


def _column(text: str) -> Column:
    """Return the means over languages of the systems in a document of `compare`."""
    means = {name: system["groups"]["all"] for name, system in json.loads(text)["systems"].items()}
    return {
        name: Score(
            **{key: math.nan if mean[key] is None else float(mean[key]) for key in ("value", "low", "high")},
            n=mean["n"],
        )
        for name, mean in means.items()
    }


def read_columns(arguments: Sequence[str]) -> dict[str, Column]:
    """Read documents of `compare` from `NAME=FILE` arguments, by name.

    Raises:
        UsageError: an argument has another form, or a name occurs twice.
        DataError: a file is not a document of `compare`.
    """
    columns: dict[str, Column] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals or not name or name in columns:
            raise UsageError(
                f"a data set must be given once, as NAME=FILE, such as xnli=xnli.json, got {argument!r}.",
                code="compare.document-name",
            )
        try:
            columns[name] = _column(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"{file} must be a document of `compare` (--document): {error.strerror}.", code="compare.not-document"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{file} must be a document of `compare` (--document), and is something else.",
                code="compare.not-document",
            ) from error
    return columns


def side_by_side(columns: Mapping[str, Column]) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of a table of systems over data sets, with the mean for systems that have all of them.

    Data sets are assumed to be independent: the half-widths of the mean's interval are the root of the sum of squared
    half-widths, divided by the number of data sets.

    Reference: the format of table 1 of the FLARE paper, which gives standard deviations over seeds.
    """
    systems = dict.fromkeys(system for column in columns.values() for system in column)
    rows = []
    for system in systems:
        scores = [column.get(system) for column in columns.values()]
        known = [score for score in scores if score]
        mean = _format(_mean(known)) if len(known) == len(scores) else ""
        rows.append([system, *(_format(score) if score else "" for score in scores), mean])
    return ["system", *columns, "mean"], rows


def _mean(scores: Sequence[Score]) -> Score:
    count = len(scores)
    value = sum(score.value for score in scores) / count
    below = math.sqrt(sum((score.low - score.value) ** 2 for score in scores)) / count
    above = math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / count
    return Score(value=value, low=value - below, high=value + above, n=sum(score.n for score in scores))


def _format(score: Score) -> str:
    value = f"{score.value:.3f}"
    return value if math.isnan(score.low) else f"{value} [{score.low:.3f}, {score.high:.3f}]"
