"""Real data sets, where they are: every file is read, and the counts are those of their documentation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adaptermix.tasks import get_task
from adaptermix.tasks.data import read_pairs, read_parallel

read_slots = get_task("slots").read

DATA = Path(os.environ.get("ADAPTERMIX_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (DATA / "xsid").is_dir(), reason="needs real data in $ADAPTERMIX_DATA"),
]


@pytest.mark.parametrize("part", ["valid", "test"])
def test_xsid_is_read_whole(part: str) -> None:
    for path in sorted((DATA / "xsid").glob(f"*.{part}.conll.gz")):
        rows, files = read_slots([str(path)])
        expected = {"valid": 300, "test": 500}[part] // (2 if path.name.startswith("ja.") else 1)
        assert (path.name, len(rows)) == (path.name, expected)
        assert files[0].language == path.name.split(".")[0]
        assert all(len(row.tokens) == len(row.tags) for row in rows)
        assert sum(bool(row.slots) for row in rows) > len(rows) / 2


def test_the_english_training_set_is_read_whole() -> None:
    rows, _ = read_slots([str(DATA / "xsid" / "en.train.tsv.gz")])
    assert len(rows) == 35_915


def test_tatoeba_and_ntrex_are_read() -> None:
    pairs, files = read_pairs([str(DATA / "tatoeba" / "*-eng.tsv.gz")])
    assert (len(pairs), len(files)) == (64_872, 75)
    assert {file.languages[1] for file in files} == {"en"}
    parallel = read_parallel([str(DATA / "ntrex" / f"{code}.txt.gz") for code in ("deu", "eng", "swa")])
    assert {len(lines) for lines in parallel.texts.values()} == {1997}
