"""Margin retrieval against a double loop, and embeddings against one sentence at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix import RetrieveSettings, retrieve
from adaptermix.evaluation.retrieval import accuracy, embed, margin_neighbours
from adaptermix.models import backbone, load_base


def brute_force(x: torch.Tensor, y: torch.Tensor, k: int) -> list[int]:
    """Written from the formula: candidates are the k nearest of x, divided by both means of k nearest."""

    def cos(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b) / (float(a.norm()) * float(b.norm()))

    def nearest(a: torch.Tensor, others: torch.Tensor) -> list[tuple[float, int]]:
        return sorted(((cos(a, other), -i) for i, other in enumerate(others)), reverse=True)[:k]

    found = []
    for a in x:
        forward = nearest(a, y)
        mean_forward = sum(value for value, _ in forward) / len(forward)
        best = (-math.inf, 0)
        for value, negative in forward:
            back = nearest(y[-negative], x)
            mean_back = sum(v for v, _ in back) / len(back)
            best = max(best, (value / ((mean_forward + mean_back) / 2), negative))
        found.append(-best[1])
    return found


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10_000))
def test_neighbours_equal_a_double_loop(n: int, m: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # positive entries, so that no mean of cosines is near zero
    x, y = (torch.rand(size, 6, generator=generator, dtype=torch.float64) + 0.05 for size in (n, m))
    assert margin_neighbours(x.float(), y.float(), k=k).tolist() == brute_force(x, y, k)


def test_equal_sets_retrieve_themselves() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert accuracy(x, x.clone()) == 1.0
    assert accuracy(x, x.roll(1, 0)) == 0.0


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_embeddings_equal_hidden_states_of_one_sentence_at_a_time(kind: str, request: pytest.FixtureRequest) -> None:
    base = load_base(str(request.getfixturevalue(kind)), dtype="float32", device="cpu")
    texts = ["a longer sentence than the others", "ja", "Grüße"]
    found = embed(base, texts, batch_size=2, max_length=64)
    for row, text in enumerate(texts):
        batch = base.tokenizer(text, return_tensors="pt")
        states = backbone(base)(**batch, output_hidden_states=True).hidden_states
        expected = torch.stack([state[0].mean(0) for state in states])
        torch.testing.assert_close(found[:, row], expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (base.layers + 1, 3, 32)


def test_retrieve_gives_every_layer_and_both_directions(causal: Path, tmp_path: Path) -> None:
    path = tmp_path / "de-en.tsv"
    path.write_text("".join(f"{word}\t{word}\n" for word in ("eins", "zwei", "drei", "vier", "fünf")))
    found = retrieve(RetrieveSettings(base=str(causal), data=[str(path)], dtype="float32", device="cpu"))
    document = found.document()
    assert list(document["layers"]) == ["0", "1", "2", "3", "4"]
    assert document["layers"]["2"] == {"mean": 1.0, "directions": {"de-en": 1.0, "en-de": 1.0}}
    assert document["headline"] == 1.0
