"""Tables over several data sets: one column each, from the documents of `compare`, and their mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError

Column = Mapping[str, Mapping[str, Any]]
"""Mean over languages of each system, in the form of `Score.document`."""


def column_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean over languages of each system of a document of `compare`."""
    return {name: system["groups"]["all"] for name, system in document["systems"].items()}


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
            columns[name] = column_of(json.loads(Path(file).read_text(encoding="utf-8")))
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
        mean = _format(*_mean(known)) if len(known) == len(scores) else ""
        cells = [_format(score["value"], score["low"], score["high"]) if score else "" for score in scores]
        rows.append([system, *cells, mean])
    return ["system", *columns, "mean"], rows


def _mean(scores: Sequence[Mapping[str, Any]]) -> tuple[float, float | None, float | None]:
    count = len(scores)
    value = sum(score["value"] for score in scores) / count
    if any(score["low"] is None for score in scores):
        return value, None, None
    below, above = (
        math.sqrt(sum((score[end] - score["value"]) ** 2 for score in scores)) / count for end in ("low", "high")
    )
    return value, value - below, value + above


def _format(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
