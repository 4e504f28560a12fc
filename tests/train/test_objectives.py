"""The two losses against loops written from their formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix.models import load_base
from adaptermix.train.objectives import answer_loss, contrastive_loss
from adaptermix.train.sampler import Sampler
from adaptermix.train.task import collate


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
    assert batch["labels"][1].tolist() == [-100, 12, 2, -100, -100, -100, -100]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0, 0]


class TestSampler:
    def test_every_row_comes_once_per_pass(self) -> None:
        sampler = Sampler(groups=[range(10)], batch_size=5, seed=3)
        assert sorted(sampler.batch(0) + sampler.batch(1)) == list(range(10))
        assert sorted(sampler.batch(2) + sampler.batch(3)) == list(range(10))
        assert sampler.batch(0) != sampler.batch(2)

    def test_groups_come_equally_often_whatever_their_size(self) -> None:
        sampler = Sampler(groups=[range(100), [100, 101], [102]], batch_size=9, seed=0)
        rows = [row for number in range(10) for row in sampler.batch(number)]
        assert [sum(row < 100 for row in rows), sum(row in (100, 101) for row in rows), rows.count(102)] == [30, 30, 30]

    def test_batches_are_a_function_of_the_seed_and_the_number(self) -> None:
        one, other = (Sampler(groups=[range(50)], batch_size=8, seed=seed) for seed in (1, 2))
        assert one.batch(4) == Sampler(groups=[range(50)], batch_size=8, seed=1).batch(4)
        assert one.batch(4) != other.batch(4)
