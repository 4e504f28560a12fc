"""Multi30k, WMT23, ALMA and XQuAD, where they are: the counts are those of their documentation."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from adaptermix.evaluation.run import score_answers
from adaptermix.tasks import get_task

read_qa = get_task("qa").read
read_translations = get_task("translate").read


DATA = Path(os.environ.get("ADAPTERMIX_DATA", "not given"))
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (DATA / "xquad").is_dir(), reason="needs real data in $ADAPTERMIX_DATA"),
]
WMT23 = {
    "de-en": 549,
    "en-cs": 2074,
    "en-de": 557,
    "en-he": 2074,
    "en-ja": 2074,
    "en-ru": 2074,
    "en-zh": 2074,
    "zh-en": 1976,
}


def test_wmt23_is_read_whole_and_its_references_score_fully() -> None:
    task = get_task("translate")
    rows, files = read_translations([str(DATA / "mt_wmt23" / "*.gz")])
    assert Counter(map(task.language, rows)) == WMT23
    assert len(files) == 16
    some = [row for row in rows if row.target_language in ("en", "ja", "zh")]
    found = score_answers(task, some, [row.target for row in some], {}, seed=0)
    assert {name: score.value for name, score in found.scores.items()} == pytest.approx(
        dict.fromkeys(("de-en", "en-ja", "en-zh", "zh-en"), 100)
    )


def test_multi30k_is_read_in_the_order_given() -> None:
    task = get_task("translate")
    files = [str(DATA / "multi30k" / f"train.{code}.gz") for code in ("de", "cs", "en")]
    rows, _ = read_translations(files)
    assert Counter(map(task.language, rows)) == dict.fromkeys(("de-cs", "de-en", "cs-en"), 8000)
    rows, _ = read_translations([str(DATA / "multi30k" / "val.*.gz")], rows=":100")
    assert set(Counter(map(task.language, rows)).values()) == {100}
    assert rows[0].source_language == "cs"


def test_alma_is_read_whole() -> None:
    rows, _ = read_translations([str(DATA / "mt_alma" / "train.*-en.tsv.gz")])
    assert Counter(map(get_task("translate").language, rows)) == dict.fromkeys(
        ("cs-en", "de-en", "is-en", "ru-en", "zh-en"), 1200
    )


def test_xquad_is_read_whole_parallel_by_id_and_its_answers_score_fully() -> None:
    task = get_task("qa")
    rows, _ = read_qa([str(DATA / "xquad" / "xquad.*.json.gz")])
    languages = ["de", "en", "es", "tr", "zh"]
    assert Counter(row.language for row in rows) == dict.fromkeys(languages, 1190)
    ids = [{row.id for row in rows if row.language == language} for language in languages]
    assert all(len(one) == 1190 and one == ids[0] for one in ids)
    assert all(row.answers for row in rows)
    found = score_answers(task, rows, [task.answer(row) for row in rows], {}, seed=0)
    assert {score.value for score in found.scores.values()} == {1.0}
    assert {score.value for score in found.others["exact_match"].values()} == {1.0}
