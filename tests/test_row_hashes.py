"""Sets of row hashes: against a count by hand over the texts themselves, and as files."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path

import pytest

from adaptermix.provenance import row_hashes
from adaptermix.provenance.row_hashes import (
    ListedRows,
    RowHashes,
    RowTexts,
    normalised,
    pack,
    read_sets,
    remember,
    unpack,
    write_sets,
)

WORDS = ["sun", "moon", "star", "tree", "lake", "hill", "road", "door", "lamp", "book"]


def listed(*rows: str | tuple[str, ...], separate: bool = False) -> ListedRows:
    return ListedRows.of(RowTexts((row,) if isinstance(row, str) else row, separate=separate) for row in rows)


def counted(own: list[RowTexts], others: list[RowTexts]) -> int:
    """Count by the texts: the rule of `ListedRows.overlap` in plain words."""

    def whole(row: RowTexts) -> tuple[str, ...]:
        return tuple(sorted(map(normalised, row.texts)))

    rows = {whole(other) for other in others}
    sides = {t for other in others if other.separate for t in whole(other)} | {
        t for r in rows if len(r) == 1 for t in r
    }
    parts = {t for other in others if len(other.texts) > 1 for t in whole(other)} | sides
    count = 0
    for row in own:
        alone = set(whole(row)) if row.separate or len(row.texts) == 1 else set()
        count += whole(row) in rows or bool(alone & parts) or bool(set(whole(row)) & sides)
    return count


@pytest.mark.parametrize("seed", range(20))
def test_the_count_is_that_over_the_texts(seed: int) -> None:
    draw = random.Random(seed)

    def row() -> RowTexts:
        texts = tuple(" ".join(draw.choices(WORDS, k=2)) for _ in range(draw.choice((1, 2))))
        return RowTexts(texts, separate=len(texts) > 1 and draw.random() < 0.5)

    own, others = ([row() for _ in range(draw.randrange(1, 40))] for _ in range(2))
    parts = [others[: len(others) // 2], others[len(others) // 2 :]]
    found = ListedRows.of(own).overlap([RowHashes.of(part) for part in parts if part])
    assert (found.same, found.total) == (counted(own, others), len(own))


def sentences(count: int, what: str = "sentence") -> list[str]:
    return [f"this rather long {what} has the number {number}" for number in range(count)]


@pytest.mark.parametrize(
    ("same", "file", "other", "matters"),
    [
        (12, 300, 500, False),  # 4 % of long rows
        (43, 300, 10_000, True),  # 14 %: more than a tenth
        (38, 300, 10_000, False),
        (100, 36_000, 400, True),  # a quarter of the other's rows
        (75, 36_000, 400, False),  # a sixth is 67, and chance adds up to 12
        (1, 1, 1, True),
        (1, 30, 30, False),
        (6, 6_000, 6, True),  # all of it
        (4, 6_000, 6, True),
        (3, 6_000, 6, False),
    ],
)
def test_more_than_chance_is_a_share_of_either_file(same: int, file: int, other: int, *, matters: bool) -> None:
    common = sentences(same)
    found = listed(*common, *sentences(file - same, "line")).overlap(
        [listed(*common, *sentences(other - same, "text")).hashes]
    )
    assert (found.same, found.total, found.matters) == (same, file, matters)


def test_rows_that_repeat_count_once() -> None:
    found = listed(*["yes, please do that"] * 500, *sentences(100)).overlap(
        [listed("Yes, please do that!", *sentences(90, "x")).hashes]
    )
    assert (found.same, found.total, found.matters) == (500, 600, False)


def test_sets_are_read_as_they_were_written_and_damage_is_found(tmp_path: Path) -> None:
    one, two = listed(*sentences(5)).hashes, listed(("a side", "another"), ("b", "c"), separate=True).hashes
    write_sets(tmp_path, [remember(one), remember(two), "unknown", None])
    path = tmp_path / "adaptermix.rows"
    assert {key: chain(found.whole) and found.key for key, found in read_sets(path).items()} == {
        k.key: k.key for k in (one, two)
    }
    content = path.read_bytes()
    assert len(content.partition(b"\n")[2]) == 8 * (5 + 2 + 4)
    assert list(unpack(content)) == sorted([one.key, two.key])
    for broken in (
        b"",
        content[:-1],
        content[:-8],
        b"{}\n",
        b"[]\n",
        content.replace(b'"version":1', b'"version":2'),
        content[:-1] + b"x",
    ):
        with pytest.raises(ValueError, match="the file must"):
            unpack(broken)
    assert unpack(pack({})) == {}


def test_lone_surrogates_and_signs_alone_have_hashes() -> None:
    rows = listed("\ud800 broken", "?!", "🙂 ok 🙃", "\U0001f600")
    assert len(set(rows.whole.tolist())) == 4
    assert rows.overlap([rows.hashes]).same == 4


def test_two_hundred_thousand_pairs_take_five_megabytes() -> None:
    some = listed(*((f"source {n}", f"target {n}") for n in range(2000)), separate=True).hashes
    assert len(pack({some.key: some})) < 2000 * 24 + 100


def test_lengths_are_told_from_the_hash() -> None:
    kinds = [int(found) & 3 for found in (listed(text).whole[0] for text in ("ja", "zwölf Zei", "x" * 24, "好的"))]
    assert kinds == [0, 1, 2, 0]
    assert row_hashes.LONG_LETTERS == 24
