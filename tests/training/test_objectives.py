"""The two losses against loops written from their formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermix.models.base import load_base
from adaptermix.training.losses import answer_loss, contrastive_loss
from adaptermix.training.task import collate
from tests.tiny import tiny_causal


def vectors(seed: int, n: int = 5, d: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def by_loop(source: torch.Tensor, target: torch.Tensor, temperature: float) -> float:
    """Equation 1, anchor by anchor, in float64."""
    source, target = source.double(), target.double()
    total = 0.0
    for i, anchor in enumerate(source):
        scores = [float(anchor @ other / (anchor.norm() * other.norm())) / temperature for other in target]
        total -= scores[i] - math.log(sum(math.exp(score) for score in scores))
    return total / len(source)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 1.5])
def test_the_loss_is_one_directional_as_published(temperature: float) -> None:
    source, target = vectors(0)
    found = float(contrastive_loss(source, target, temperature=temperature))
    assert found == pytest.approx(by_loop(source, target, temperature), rel=1e-5)
    assert found != pytest.approx(by_loop(target, source, temperature), rel=1e-4)


def test_symmetric_is_the_mean_of_both_directions() -> None:
    source, target = vectors(1)
    expected = (by_loop(source, target, 0.1) + by_loop(target, source, 0.1)) / 2
    assert float(contrastive_loss(source, target, symmetric=True)) == pytest.approx(expected, rel=1e-5)


def test_equal_sentences_are_no_negatives_when_masked() -> None:
    source, target = vectors(2, n=3)
    target[2] = target[0]
    same = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    masked = float(contrastive_loss(source, target, same=same))
    rows = []
    for i, allowed in enumerate([[0, 1], [0, 1, 2], [1, 2]]):
        cosines = torch.cosine_similarity(source[i : i + 1], target[allowed]) / 0.1
        rows.append(float(torch.logsumexp(cosines, 0) - cosines[allowed.index(i)]))
    assert masked == pytest.approx(sum(rows) / 3, rel=1e-5)
    assert masked < float(contrastive_loss(source, target))


def test_half_precision_is_computed_in_float32() -> None:
    source, target = (side.bfloat16() for side in vectors(3))
    assert contrastive_loss(source, target).dtype == torch.float32
    assert float(contrastive_loss(source, target)) == pytest.approx(by_loop(source, target, 0.1), rel=1e-4)


@pytest.fixture(scope="module")
def ragged(causal: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    base = load_base(str(causal), dtype="float32", device="cpu")
    examples = [([5, 6, 7, 8], [9, 10, 2]), ([11], [12, 2]), ([5, 6], [7, 8, 9, 10, 2])]
    return base.model, collate(examples, 0, torch.device("cpu"))


def test_the_answer_loss_equals_that_of_transformers(ragged: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, batch = ragged
    assert float(answer_loss(model, **batch)) == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_logits_are_computed_only_where_labels_are(ragged: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, batch = ragged
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape[:2])))
    answer_loss(model, **batch)
    handle.remove()
    labelled = int((batch["labels"][:, 1:] != -100).any(0).sum())
    assert seen == [(3, labelled)]
    assert labelled < batch["labels"].shape[1]


def test_prompts_and_padding_have_no_labels(ragged: tuple[Any, dict[str, torch.Tensor]]) -> None:
    _, batch = ragged
    assert batch["labels"][1].tolist() == [-100, -100, -100, -100, -100, 12, 2]
    assert batch["attention_mask"][1].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch["position_ids"][1].tolist() == [0, 0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("temperature", [0.1, 1.5])
def test_the_loss_is_the_row_cross_entropy_of_the_matrix_with_anchor_side_first(temperature: float) -> None:
    source, target = vectors(4)
    matrix = torch.cosine_similarity(source[:, None], target[None], dim=2) / temperature
    gold = torch.arange(len(source))
    found = contrastive_loss(source, target, temperature=temperature)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(matrix, gold), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(found, torch.nn.functional.cross_entropy(matrix.T, gold), rtol=1e-4)


@given(st.integers(1, 6), st.integers(0, 1000), st.floats(0.05, 3.0), st.booleans())
def test_the_loss_with_duplicates_masked_equals_a_loop(n: int, seed: int, temperature: float, symmetric: bool) -> None:
    source, target = vectors(seed, n=n)
    kinds = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    same = kinds[:, None] == kinds[None]

    def one_way(anchors: torch.Tensor, others: torch.Tensor) -> float:
        total = 0.0
        for i in range(n):
            scores = {
                j: float(anchors[i].double() @ others[j].double() / (anchors[i].norm() * others[j].norm()))
                / temperature
                for j in range(n)
                if j == i or not same[i, j]
            }
            total += math.log(sum(map(math.exp, scores.values()))) - scores[i]
        return total / n

    expected = one_way(source, target)
    if symmetric:
        expected = (expected + one_way(target, source)) / 2
    found = contrastive_loss(source, target, temperature=temperature, symmetric=symmetric, same=same)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_mask_of_the_diagonal_alone_and_the_length_of_vectors_change_nothing() -> None:
    source, target = vectors(5)
    plain = contrastive_loss(source, target)
    torch.testing.assert_close(contrastive_loss(source, target, same=torch.eye(5, dtype=torch.bool)), plain)
    torch.testing.assert_close(contrastive_loss(source * 7, target * torch.rand(5, 1).add(0.1)), plain)


def test_all_equal_sentences_or_a_single_pair_have_nothing_to_learn() -> None:
    source, target = vectors(6)
    assert float(contrastive_loss(source, target, same=torch.ones(5, 5, dtype=torch.bool))) == 0.0
    assert float(contrastive_loss(source[:1], target[:1])) == 0.0


def test_both_sides_get_a_gradient() -> None:
    """The released code has a switch that stops it on the second side; it is off there too."""
    source, target = (side.requires_grad_() for side in vectors(7))
    contrastive_loss(source, target, same=torch.ones(5, 5, dtype=torch.bool).triu()).backward()
    for side in (source, target):
        assert side.grad is not None
        assert torch.isfinite(side.grad).all()
        assert side.grad.abs().sum() > 0


def test_half_precision_gives_the_loss_of_its_values_in_float32() -> None:
    source, target = (side.bfloat16() for side in vectors(8, n=16, d=64))
    found = contrastive_loss(source, target, temperature=0.01)
    assert float(found) == float(contrastive_loss(source.float(), target.float(), temperature=0.01))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_the_answer_loss_and_its_gradient_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = load_base(str(tiny_causal(tmp_path / kind, kind)), dtype="float32", device="cpu").model
    examples = [([5, 6, 7, 8, 9, 10], [11, 2]), ([12], [13, 14, 15, 16, 2]), ([5], [2])]
    batch = collate(examples, 0, torch.device("cpu"))
    weight = model.get_input_embeddings().weight.requires_grad_()
    ours, theirs = answer_loss(model, **batch), model(**batch).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_every_token_of_an_answer_weighs_the_same_whatever_its_row(ragged: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, batch = ragged
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().log_softmax(-1)
    terms = [
        -logits[row, place - 1, token]
        for row, labels in enumerate(batch["labels"].tolist())
        for place, token in enumerate(labels)
        if token != -100
    ]
    assert len(terms) == 3 + 2 + 5
    assert float(answer_loss(model, **batch)) == pytest.approx(float(sum(terms) / len(terms)), rel=1e-5)


def test_cosines_are_in_float32_under_autocast() -> None:
    source, target = torch.randn(6, 8), torch.randn(6, 8)
    expected = contrastive_loss(source, target, temperature=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(source, target, temperature=0.01), expected)
