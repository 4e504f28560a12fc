"""One vector per sentence, against a loop over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.models.base import load_base
from adaptermix.models.pooling import MeanAndEdge, Pooler, Standard, Standards, masked_mean

from .refusals import refuses


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_the_mean_is_that_of_a_loop_over_unmasked_tokens(rows: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, 3, generator=generator)
    mask = torch.randint(0, 2, (rows, tokens), generator=generator)
    for row, found in enumerate(masked_mean(hidden, mask)):
        kept = [hidden[row, t].double() for t in range(tokens) if mask[row, t]]
        expected = sum(kept, torch.zeros(3, dtype=torch.float64)) / max(1, len(kept))
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_what_stands_in_padding_does_not_count() -> None:
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    other = hidden.clone()
    other[0, 2] = 1e6
    torch.testing.assert_close(masked_mean(hidden, mask), masked_mean(other, mask))


def test_a_row_without_tokens_is_zero_rather_than_nan() -> None:
    assert masked_mean(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_in_float32(dtype: torch.dtype) -> None:
    """Half precision added up in its own dtype would stop growing at 256 or 2048."""
    hidden = torch.ones(1, 4001, 2, dtype=dtype)
    found = masked_mean(hidden, torch.ones(1, 4001, dtype=torch.long))
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0, 1.0]]


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10_000))
def test_z_scores_equal_plain_loops(rows: int, width: int, seed: int) -> None:
    vectors = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 5
    vectors[:, 0] = 7.0  # does not vary
    found = Standard.of([vectors[:3], vectors[3:]])(vectors)
    for place in range(width):
        column = vectors[:, place].tolist()
        mean = sum(column) / rows
        spread = math.sqrt(sum((x - mean) ** 2 for x in column) / rows) or 1.0
        expected = torch.tensor([(x - mean) / spread for x in column], dtype=torch.float64)
        torch.testing.assert_close(found[:, place], expected, rtol=1e-9, atol=1e-9)


def test_a_long_token_does_not_drown_the_others(causal: Path) -> None:
    tokenizer = load_base(str(causal), dtype="float32", device="cpu").tokenizer
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    long = states * torch.tensor([1000.0, 1.0, 1.0])[:, None]
    pool, mask = Pooler(tokenizer, standardize="all"), torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(pool(long, mask), pool(states, mask))
    unit = states / states.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(pool(states, mask), torch.stack([unit[0].mean(0), unit[1, :2].mean(0)]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # states 8, -2 and 4 of a start token and two others, then one of padding; the second row has no start token
        ({}, [10 / 3, 2]),
        ({"pooling": "mean", "exclude_bos": True}, [1, 2]),
        ({"pooling": "bos"}, [8, 3]),
        # directions instead of states: 1, -1 and 1
        ({"standardize": "all"}, [1 / 3, 1]),
        ({"standardize": "languages", "exclude_bos": True}, [0, 1]),
        ({"standardize": "all", "pooling": "bos"}, [1, 1]),
    ],
    ids=str,
)
def test_the_vector_of_a_sentence_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    class Tokenizer:
        all_special_ids = (0, 1)

    pool = Pooler(Tokenizer(), **options)
    hidden = torch.tensor([[[8.0], [-2.0], [4.0], [100.0]], [[3.0], [1.0], [100.0], [100.0]]])
    mask = pool.counted([[1, 5, 6], [5, 1]], torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]))
    assert pool(hidden, mask)[:, 0].tolist() == pytest.approx(expected)
    assert [pool.count(ids) for ids in ([1, 5, 6], [5, 1], [])] == [2 if "exclude_bos" in options else 3, 2, 0]


def test_whose_z_scores_they_are_by_hand() -> None:
    """German has -3 and 3, English 5 and 11: alone means of 0 and 8, spreads of 3; together 4 and 5."""
    german, english = (torch.tensor([[low], [low + 6]] * 8) for low in (-3.0, 5.0))
    vectors = {"de": [german], "en": [english[:3], english[3:]]}
    found = {
        way: [float(measures[language](torch.tensor([[14.0]]))) for language in ("de", "en")]
        for way in ("all", "languages")
        if (measures := Standards(way, vectors))
    }
    assert found == {"all": [2.0, 2.0], "languages": [pytest.approx(14 / 3), 2.0]}
    assert not Standards("none", vectors)
    with refuses("standardize.language: fr"):
        Standards("languages", vectors)["fr"]
    with refuses("standardize.too-few: 15.*de"):
        Standards("languages", {"de": [german[1:]]})


def test_mean_and_edge_by_hand() -> None:
    """Values of two rows: a mean beside the first token of encoders, or beside the last token of language models."""

    class Tokenizer:
        all_special_ids = (1,)

    hidden = torch.tensor([[[8.0], [2.0], [4.0]], [[6.0], [0.0], [0.0]]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    encoder, causal = (MeanAndEdge(Tokenizer(), kind=kind) for kind in ("encoder", "causal"))
    assert encoder(hidden, mask).tolist() == [[pytest.approx(14 / 3), 8.0], [6.0, 6.0]]
    assert causal(hidden, mask).tolist() == [[3.0, 4.0], [6.0, 6.0]]
    # where a first special token is left out and is the only one, the row has nothing but it
    without = MeanAndEdge(Tokenizer(), kind="causal", exclude_bos=True)
    counted = without.counted([[1, 5, 5], [1]], mask)
    assert without(hidden, counted).tolist() == [[3.0, 4.0], [0.0, 6.0]]
