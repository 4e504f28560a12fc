"""NusaX, XNLI and Universal NER, where they are: the counts are those of their documentation."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from adaptermix.tasks import get_task
from adaptermix.tasks.nli import LABELS

from ...scoring import count

read_classify = get_task("classify").read
read_ner = get_task("ner-json").read
read_nli = get_task("nli").read

DATA = Path(os.environ.get("ADAPTERMIX_DATA", "not given"))
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (DATA / "uner").is_dir(), reason="needs real data in $ADAPTERMIX_DATA"),
]


@pytest.mark.parametrize(("part", "size"), [("train", 500), ("valid", 100), ("test", 400)])
def test_nusax_is_read_whole_with_its_folders_as_languages(part: str, size: int) -> None:
    rows, files = read_classify([str(DATA / "nusax" / "sentiment" / "*" / f"{part}.csv.gz")])
    languages = ["ace", "ban", "bjn", "bug", "en", "id", "jv", "min", "su"]
    assert Counter(row.language for row in rows) == dict.fromkeys(languages, size)
    assert [file.language for file in files] == languages
    assert {row.label for row in rows} == {"positive", "neutral", "negative"}
    metrics = get_task("classify").metrics(rows)
    assert all(metrics[0].count(row, row.label) == (1, 1) for row in rows)


def test_xnli_is_read_whole() -> None:
    for part, size, expected in [("dev", 2490, (830, 830, 830)), ("test", 2000, (671, 670, 659))]:
        rows, files = read_nli([str(DATA / "xnli" / f"{part}.*.tsv.gz")])
        assert len(files) == 8
        for language in ("ar", "de", "en", "es", "fr", "sw", "tr", "zh"):
            labels = Counter(row.label for row in rows if row.language == language)
            assert (labels.total(), tuple(labels[name] for name in LABELS)) == (size, expected)


# sentences, tokens, and entities PER, ORG, LOC, as in SOURCE.md
UNER = {
    "en.train": (12543, 204579, 2873, 1434, 2698),
    "en.test": (2077, 25097, 449, 322, 317),
    "zh.test": (500, 12012, 205, 129, 429),
    "da.train": (4383, 80378, 1235, 907, 880),
    "hr.train": (6914, 152857, 2432, 2755, 3074),
    "sr.test": (520, 11421, 209, 251, 387),
    "sv.dev": (504, 9797, 13, 5, 5),
}


@pytest.mark.parametrize("name", UNER)
def test_universal_ner_is_read_whole_and_its_answers_score_fully(name: str) -> None:
    rows, files = read_ner([str(DATA / "uner" / f"{name}.iob2.gz")])
    kinds = Counter(kind for row in rows for kind, _ in row.entities)
    tokens = sum(len(row.tokens) for row in rows)
    assert (len(rows), tokens, kinds["PER"], kinds["ORG"], kinds["LOC"]) == UNER[name]
    assert files[0].language == name[:2]
    task = get_task("ner-json")
    scored = [count(task, row, task.answer(row)) for row in rows[:1000]]
    assert all(counts["tuple_f1"][1:] == (0, 0) for counts in scored)
    # a name may occur first where it is not annotated, such as inside a longer name
    entities = sum(len(row.entities) for row in rows[:1000])
    assert sum(counts["entity_f1"][0] for counts in scored) >= 0.97 * entities
