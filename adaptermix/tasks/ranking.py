"""Ranking of documents for queries: rows of query, title, snippet and relevance, as XGLUE has them for web pages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .base import BaseTask, task
from .data.files import DataFile
from .data.tables import ROW_NAMES, Row, is_json, records, row_language, table_cells, usable
from .metrics import Metric, mean, mean_ends
from .prompts import Template, table

_COLUMNS = {
    "query": ("query", "question"),
    "title": ("web_page_title", "wed_page_title", "title", "document", "text"),
    "snippet": ("web_page_snippet", "snippet", "body"),
    "relevance": ("relavance_label", "relevance_label", "relevance", "label"),
}
"""Names of columns; XGLUE's copy on the Hub spells two of them so."""
_NAMES = ("bad", "fair", "good", "excellent", "perfect")
"""Names of XGLUE's grades 0 to 4."""
_MOST = 99
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingRow(Row):
    """A query with its documents.

    Args:
        query: The query.
        documents: The documents, titles and snippets as one text.
        relevance: How relevant each document is, 0 for not at all.
    """

    query: str
    documents: tuple[str, ...]
    relevance: tuple[int, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.query, *self.documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged(Row):
    """A query with one document: a line of a file."""

    query: str
    document: str
    relevance: int

    @property
    def texts(self) -> tuple[str, ...]:
        return self.query, self.document


def _lines(file: DataFile) -> Iterator[_Judged | DataError | None]:
    cells = [] if is_json(file) else next(table_cells(file), (0, []))[1]
    order = [name for name in _COLUMNS if name != "snippet" or len(cells) != 3]
    for number, record in records(file, {**_COLUMNS, **ROW_NAMES}, order, label="relevance", optional=("snippet",)):
        if record is None:
            yield None
            continue
        written = record["relevance"].lower()
        grade = _NAMES.index(written) if written in _NAMES else int(written) if written.isdecimal() else -1
        if not 0 <= grade <= _MOST:
            yield DataError(
                f"{file.path}:{number}: a relevance must be a whole number from 0 to {_MOST}, or one of "
                f"{', '.join(_NAMES)}, found {record['relevance'][:60]!r}.",
                code="ranking.relevance",
            )
            continue
        yield _Judged(
            query=record["query"],
            document=" ".join(f"{record['title']} {record.get('snippet', '')}".split()),
            relevance=grade,
            language=row_language(file, record.get("language")),
            cluster=record.get("cluster", ""),
        )


def dcg(gains: Sequence[float], scores: Sequence[float]) -> float:
    """Return the discounted cumulative gain of documents in the order of their scores.

    Documents with equal scores have the mean over their orders, as in scikit-learn's `dcg_score`.

    Example:
        >>> dcg([1, 0], [2.0, 1.0]), dcg([1, 0], [1.0, 1.0])
        (1.0, 0.8154648767857288)
    """
    discounts: NDArray[np.float64] = 1 / np.log2(np.arange(len(gains)) + 2)
    _, ranks, counts = np.unique(-np.asarray(scores, dtype=np.float64), return_inverse=True, return_counts=True)
    total = np.concatenate([[0.0], np.cumsum(discounts)])
    ends = np.cumsum(counts)
    means = (total[ends] - total[ends - counts]) / counts
    return float((np.asarray(gains, dtype=np.float64) * means[ranks]).sum())


def ndcg(relevance: Sequence[int], scores: Sequence[float]) -> float:
    """Return the normalised discounted cumulative gain in [0, 1]; 0 if no document is relevant."""
    best = dcg(relevance, relevance)
    return dcg(relevance, scores) / best if best else 0.0


def scores_of(answer: str, count: int) -> list[float]:
    """Return the score of each of `count` documents from the numbers of an answer's first line.

    Documents without a number are ranked last.
    """
    line = next(iter(answer.strip().splitlines()), "")
    numbers = [float(number[:40]) for number in _NUMBER.findall(line)[:count]]
    least = min(numbers, default=0.0) - 1
    return numbers + [least] * (count - len(numbers))


def _decimal(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


@task
class Ranking(BaseTask[RankingRow]):
    """Ranking of the documents of a query, scored by nDCG.

    For web page ranking (WPR of XGLUE, Liang et al., EMNLP 2020, arXiv 2004.01401). A classification head ranks
    documents by their expected relevance: the sum over grades of grade times probability. A language model answers with
    the grade of each document in order. `ndcg` is the mean over queries, computed as XGLUE's script does: the gain is
    the grade, the discount is logarithmic, equal scores share their gain, queries with one document do not count, and
    those without a relevant document count 0. That script ranks by the most likely grade instead.

    Files are TSV or CSV with query, title, snippet and relevance in this order, or without the snippet, or under
    a header such as XGLUE's, or JSONL with such fields. Rows with the same query are one query with its documents;
    `--rows` picks queries, and the sizes of batches count them.
    """

    name = "ranking"
    templates = table(
        Template(name="plain", prompt="Query: {query}\n{documents}\nRelevance of each:", lead=" "),
        Template(
            name="chat",
            prompt="Query: {query}\n{documents}",
            chat=True,
            system=(
                "Grade how relevant each document is to the query, 0 for not at all. Answer with the grades in order, "
                "separated by blanks."
            ),
        ),
    )

    def rows_of(self, file: DataFile) -> Iterator[RankingRow | None]:
        """Yield the queries in the order of their first documents, then None for each line that is left out."""
        queries: dict[tuple[str, str], list[_Judged]] = {}
        left_out = 0
        for line in usable(_lines(file)):
            if line is None:
                left_out += 1
            else:
                queries.setdefault((line.language, line.query), []).append(line)
        for (language, query), documents in queries.items():
            yield RankingRow(
                query=query,
                documents=tuple(each.document for each in documents),
                relevance=tuple(each.relevance for each in documents),
                language=language,
                cluster=documents[0].cluster,
            )
        yield from [None] * left_out

    def fields(self, row: RankingRow) -> Mapping[str, str]:
        listed = (f"{number}. {document}" for number, document in enumerate(row.documents, start=1))
        return {"query": row.query, "documents": "\n".join(listed)}

    def answer(self, row: RankingRow) -> str:
        return " ".join(map(str, row.relevance))

    def evidence(self, row: RankingRow) -> tuple[str, ...]:
        return (row.query, *row.documents)

    def candidates(self, row: RankingRow) -> tuple[tuple[str, str], ...]:
        return tuple((row.query, document) for document in row.documents)

    def grades(self, row: RankingRow) -> tuple[str, ...]:
        return tuple(map(str, row.relevance))

    def labels(self, rows: Sequence[RankingRow]) -> tuple[str, ...]:
        return tuple(map(str, sorted({grade for row in rows for grade in row.relevance})))

    def answer_from_relevance(self, row: RankingRow, relevance: Sequence[float]) -> str:
        return " ".join(map(_decimal, relevance))

    def metrics(self, rows: Sequence[RankingRow]) -> tuple[Metric, ...]:
        def by_query(row: RankingRow, answer: str) -> Sequence[float] | None:
            if len(row.documents) < 2:
                return None
            return ndcg(row.relevance, scores_of(answer, len(row.documents))), 1

        return (Metric(name="ndcg", count=by_query, value=mean, ends=mean_ends),)
