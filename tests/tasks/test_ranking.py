"""Queries with documents in every layout, and nDCG against scikit-learn's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import get_task
from adaptermix.tasks.ranking import RankingRow, ndcg, scores_of

from ..refusals import refuses
from .data.test_readers import PACKINGS, pack

TASK = get_task("ranking")
LINES = [("rad", "Rad", "Bei uns.", 3), ("rom", "Rom", "Alt, ja.", 4), ("rad", "Rom", "", 0)]
NAMES = {0: "Bad", 3: "Excellent", 4: "Perfect"}
FILES = {
    "xglue.wpr.de.dev": "".join("\t".join(map(str, line)) + "\n" for line in LINES),
    "de.tsv": "query\tweb_page_title\tweb_page_snippet\trelavance_label\n"
    + "".join("\t".join([*line[:3], NAMES[line[3]]]) + "\n" for line in LINES),
    "de.jsonl": "".join(
        json.dumps(dict(zip(("query", "wed_page_title", "web_page_snippet", "relavance_label"), line, strict=True)))
        + "\n"
        for line in LINES
    ),
}
ROWS = [
    RankingRow(query="rad", documents=("Rad Bei uns.", "Rom"), relevance=(3, 0), language="de"),
    RankingRow(query="rom", documents=("Rom Alt, ja.",), relevance=(4,), language="de"),
]


@PACKINGS
@pytest.mark.parametrize("name", FILES)
def test_rows_are_the_same_in_every_form_and_packing(tmp_path: Path, name: str, packing: str) -> None:
    assert TASK.read([pack(tmp_path / name, FILES[name], packing)])[0] == ROWS


def test_documents_may_be_one_text(tmp_path: Path) -> None:
    rows, _ = TASK.read(
        [pack(tmp_path / "de.tsv", "rad\tRad Bei uns.\t3\nrom\tRom Alt, ja.\t4\nrad\tRom\t0\n", "plain")]
    )
    assert rows == ROWS


def test_a_line_that_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    path = pack(tmp_path / "de.tsv", "rad\tRad\tx\t3\nrad\tRom\tx\tvery\nrad\tEi\tx\t\n", "plain")
    rows, files = TASK.read([path])
    assert ([row.documents for row in rows], files[0].left_out) == ([("Rad x",)], 2)
    with refuses(r"ranking.relevance: de\.tsv:1.*'very'"):
        TASK.read([pack(tmp_path / "de.tsv", "rad\tRad\tx\tvery\n", "plain")])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 2)), min_size=2, max_size=9))
def test_ndcg_equals_that_of_scikit_learn(documents: list[tuple[int, int]]) -> None:
    relevance, scores = zip(*documents, strict=True)
    assert ndcg(relevance, scores) == pytest.approx(ndcg_score(np.array([relevance]), np.array([scores])))


def test_the_score_is_the_mean_over_queries_with_several_documents() -> None:
    three = RankingRow(query="ei", documents=("a", "b", "c"), relevance=(0, 1, 2), language="de")
    found = score_answers(TASK, [*ROWS, three], ["0.1 0.9", "3", "0 1 2"], {}, seed=0)
    # The two documents of the first query are the wrong way round: 3 / log2(3) of 3.
    assert (found.metric, found.scores["de"].n) == ("ndcg", 2)
    assert found.overall.value == pytest.approx((1 / np.log2(3) + 1) / 2)


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ("2 0 1", [2, 0, 1]),
        ("1. 3.5, -1 7", [1, 3.5, -1]),
        ("4", [4, 3, 3]),
        ("none", [-1, -1, -1]),
        ("2\n1 1", [2, 1, 1]),
    ],
)
def test_numbers_of_the_first_line_are_scores_in_order(answer: str, scores: list[float]) -> None:
    assert scores_of(answer, 3) == scores


def test_grades_are_labels_in_their_order() -> None:
    high = RankingRow(query="q", documents=("a", "b"), relevance=(10, 2), language="de")
    assert TASK.labels([*ROWS, high]) == ("0", "2", "3", "4", "10")
