"""Counts of rows, repetitions and overlaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adaptermix.tasks.data.report import describe, normalised

rows = st.lists(st.tuples(st.sampled_from(["de", "en"]), st.text("aB ,.!", min_size=1, max_size=4)), max_size=12)


@given(rows, st.lists(st.text("aB ,.!", min_size=1, max_size=4), max_size=8))
def test_counts_equal_plain_loops(train: list[tuple[str, str]], dev: list[str]) -> None:
    found = describe(train, dev)
    texts = [text for _, text in train]
    assert sum(found.languages.values()) == len(train)
    assert found.repeated == sum(text in texts[:i] for i, text in enumerate(texts))
    assert found.overlap == sum(any(text == other for other in texts) for text in dev)
    assert found.overlap_normalised == sum(
        any(normalised(text) == normalised(other) for other in texts) for text in dev
    )
    assert found.overlap <= found.overlap_normalised <= found.held_out == len(dev)
    assert len(found.warnings()) == (found.overlap_normalised > 0)
    with_left_out = describe(train, dev, left_out=2).warnings()
    assert with_left_out[:-1] == found.warnings()
    assert with_left_out[-1] == f"2 of {len(train) + 2} rows lack a side, a label or an answer and are left out."


def test_what_counts_as_the_same() -> None:
    assert normalised("Wake me, at 5!") == normalised("wake me at 5")
    assert normalised("café") == normalised("cafe\N{COMBINING ACUTE ACCENT}")
    assert normalised("café") != normalised("cafe")
    assert normalised("5") != normalised("6")
    assert normalised("!") != normalised("?")
