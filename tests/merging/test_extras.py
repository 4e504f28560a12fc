"""Whole tensors, biases and trained tokens of several adapters, made one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix.adapters import AdapterMeta, StoredTensor, TargetSpec, open_adapter
from adaptermix.errors import IncompatibleAdapters
from adaptermix.merging.whole_tensors import merge_biases, merge_extras, merge_saved, merge_tokens, resolve_policy

from ..factories import load_base, peft_kind
from ..refusals import refuses

HEAD = "base_model.model.score.weight"


def meta(**fields: Any) -> AdapterMeta:
    return AdapterMeta(base="org/base", targets=TargetSpec(modules=("q_proj",)), **fields)


@dataclass(frozen=True)
class Fake:
    """An adapter that has whole tensors and nothing else."""

    name: str
    tensors: Mapping[str, Tensor]
    meta: AdapterMeta = field(default_factory=meta)

    @property
    def saved_headers(self) -> dict[str, StoredTensor]:
        return {key: StoredTensor(dtype="F32", shape=tuple(tensor.shape)) for key, tensor in self.tensors.items()}

    def load_saved(self, key: str) -> Tensor:
        return self.tensors[key]


A, B = Fake("task", {HEAD: torch.tensor([1.0, 3.0])}), Fake("align", {HEAD: torch.tensor([5.0, -1.0])})


class TestPolicies:
    """refuse, average, or one adapter."""

    @pytest.mark.parametrize("policy", ["refuse", "average", "align", 2])
    def test_a_tensor_of_one_adapter_is_taken_as_it_is(self, policy: str | int) -> None:
        merged = merge_saved([A, Fake("align", {})], [0.25, 0.75], policy)
        assert torch.equal(merged[HEAD], A.tensors[HEAD])

    def test_two_that_differ_are_refused_with_the_choices(self) -> None:
        with pytest.raises(IncompatibleAdapters) as caught:
            merge_saved([A, B], [0.5, 0.5])
        message = str(caught.value)
        assert "\n" not in message
        for word in (HEAD, "'task' and 'align'", "'average'", "name or number"):
            assert word in message

    def test_equal_copies_are_taken_once(self) -> None:
        half = Fake("half", {HEAD: torch.tensor([1.0, 3.0]).bfloat16()})
        assert torch.equal(merge_saved([A, half], [0.5, 0.5])[HEAD], A.tensors[HEAD])

    @pytest.mark.parametrize(("weights", "expected"), [((0.75, 0.25), [2.0, 2.0]), ((-3.0, 1.0), [2.0, 2.0])])
    def test_the_average_is_by_the_size_of_the_weights(
        self, weights: tuple[float, float], expected: list[float]
    ) -> None:
        torch.testing.assert_close(merge_saved([A, B], weights, "average")[HEAD], torch.tensor(expected))

    def test_the_average_is_over_those_that_have_it(self) -> None:
        merged = merge_saved([A, Fake("other", {}), B], [0.25, 10.0, 0.75], "average")
        torch.testing.assert_close(merged[HEAD], torch.tensor([4.0, 0.0]))

    def test_the_average_keeps_a_common_half_dtype_and_is_taken_in_float32(self) -> None:
        halves = [Fake(n, {HEAD: torch.tensor([value]).bfloat16()}) for n, value in [("a", 256.0), ("b", 1.0)]]
        result = merge_saved(halves, [0.5, 0.5], "average")[HEAD]
        assert result.dtype == torch.bfloat16
        assert result.item() == torch.tensor(128.5).bfloat16().item()

    @pytest.mark.parametrize(("policy", "expected"), [("task", A), ("align", B), (1, A), ("2", B)])
    def test_one_adapter_is_taken_by_name_or_number(self, policy: str | int, expected: Fake) -> None:
        assert torch.equal(merge_saved([A, B], [0.5, 0.5], policy)[HEAD], expected.tensors[HEAD])

    def test_where_the_chosen_one_has_none_the_others_must_agree(self) -> None:
        with refuses("saved.differ: 'task' and 'align'"):
            merge_saved([A, B, Fake("third", {})], [1, 1, 1], "third")

    @pytest.mark.parametrize("policy", ["averge", "0", "3", 0, 3, "", "\u0661"])
    def test_other_policies_are_refused(self, policy: str | int) -> None:
        with refuses("saved.policy: unknown value"):
            resolve_policy(["task", "align"], policy)

    def test_a_name_of_two_adapters_is_refused(self) -> None:
        with refuses("saved.policy: pass a number"):
            resolve_policy(["x", "x"], "x")

    def test_other_shapes_cannot_be_averaged(self) -> None:
        with refuses(r"saved.shapes: 'task' \[2\], 'x' \[3\]"):
            merge_saved([A, Fake("x", {HEAD: torch.ones(3)})], [1, 1], "average")

    def test_whole_numbers_cannot_be_averaged(self) -> None:
        made = [Fake(str(n), {HEAD: torch.tensor([n])}) for n in (4, 5)]
        with refuses("saved.dtype"):
            merge_saved(made, [1, 1], "average")

    def test_weights_of_zero_cannot_average(self) -> None:
        with refuses("saved.zero-weights"):
            merge_saved([A, B], [0.0, 0.0], "average")

    def test_the_inputs_are_left_alone(self) -> None:
        before = A.tensors[HEAD].clone(), A.tensors[HEAD]._version
        merge_saved([A, B], [0.5, 0.5], "average")
        assert torch.equal(A.tensors[HEAD], before[0])
        assert A.tensors[HEAD]._version == before[1]


class TestPlaces:
    """Where a tensor stands depends on what the merged adapter adapts."""

    def test_a_bias_moves_below_a_module_that_another_adapter_adapts(self) -> None:
        one = Fake("one", {"base_model.model.layers.0.k.bias": torch.ones(2)}, meta(bias="all"))
        two = Fake("two", {"base_model.model.layers.0.k.base_layer.bias": torch.ones(2)}, meta(bias="lora_only"))
        assert list(merge_saved([one, two], [1, 1], modules=["layers.0.k"])) == [
            "base_model.model.layers.0.k.base_layer.bias"
        ]
        assert list(merge_saved([one], [1], modules=["layers.0.q"])) == ["base_model.model.layers.0.k.bias"]

    def test_a_module_cannot_be_adapted_and_fully_trained(self) -> None:
        head = Fake("head", {"base_model.model.lm_head.weight": torch.ones(2, 2)}, meta(saved_modules=("lm_head",)))
        with refuses("saved.also-adapted: lm_head"):
            merge_saved([head, Fake("lora", {})], [1, 1], modules=["lm_head", "layers.0.q"])

    def test_trained_tokens_stand_alone(self) -> None:
        rows = "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        tokens = Fake("tokens", {rows: torch.ones(1, 2)}, meta(trainable_tokens={"": (3,)}))
        assert list(merge_saved([tokens, Fake("x", {})], [1, 1], modules=["q"])) == [rows]
        with refuses("saved.tokens-adapted: embed_tokens"):
            merge_saved([tokens, Fake("x", {})], [1, 1], modules=["embed_tokens"])
        with refuses("saved.tokens-adapted: embed_tokens"):
            merge_saved([tokens, Fake("x", {}, meta(saved_modules=("embed_tokens",)))], [1, 1])


class TestBiases:
    """A linear sum."""

    def test_the_sum_is_weighted_and_absent_ones_are_zero(self) -> None:
        merged = merge_biases([torch.tensor([1.0, 2.0]), None, torch.tensor([4.0, 0.0]).half()], [0.5, 9.0, -1.0])
        assert merged is not None
        torch.testing.assert_close(merged, torch.tensor([-3.5, 1.0]))

    def test_none_gives_none(self) -> None:
        assert merge_biases([None, None], [1.0, 1.0]) is None


class TestMeta:
    """What the merged adapter says of its extras."""

    def test_names_are_joined_and_the_widest_bias_counts(self) -> None:
        one, two = meta(saved_modules=("score", "norm")), meta(saved_modules=("norm", "head"), bias="lora_only")
        assert merge_extras(["a", "b"], [one, two]) == {
            "saved_modules": ("score", "norm", "head"),
            "bias": "lora_only",
            "trainable_tokens": {},
        }
        assert merge_extras(["a", "b"], [two, meta(bias="all")])["bias"] == "all"

    def test_tokens_of_one_adapter_or_the_same_of_all(self) -> None:
        three = meta(trainable_tokens={"": (3, 5)})
        assert merge_tokens(["a", "b", "c"], [meta(), three, three]) == {"": (3, 5)}

    @pytest.mark.parametrize("other", [{"": (5, 3)}, {"": (3,)}, {"embed_tokens": (3, 5)}])
    def test_other_tokens_are_refused(self, other: dict[str, tuple[int, ...]]) -> None:
        with refuses("saved.tokens-differ: a.*b"):
            merge_tokens(["a", "b"], [meta(trainable_tokens={"": (3, 5)}), meta(trainable_tokens=other)])


def test_adapters_on_disk_are_merged_like_the_rest(tmp_path: Path, base: Path) -> None:
    """Copies of an adapted embedding are equal in both files, and trained heads are not."""
    settings: dict[str, Any] = {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"], "r": 2}
    sources = [open_adapter(peft_kind(load_base(base), tmp_path / f"a{n}", seed=n, **settings)) for n in (0, 1)]
    with refuses(r"saved.differ: lm_head\.weight"):
        merge_saved(sources, [0.5, 0.5], modules=["model.embed_tokens"])
    merged = merge_saved(sources, [0.5, 0.5], "average", modules=["model.embed_tokens"])
    assert {key.split(".", 2)[-1] for key in merged} == {"lm_head.weight", "model.embed_tokens.base_layer.weight"}
    torch.testing.assert_close(
        merged["base_model.model.lm_head.weight"],
        sum(source.load_saved("base_model.model.lm_head.weight") for source in sources) / 2,
    )
