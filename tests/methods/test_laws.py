"""Every method of the table is held to the laws, and the table holds every method."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from adaptermix.algebra import Dense, LowRank, Stack, Update
from adaptermix.algebra.operators import Operator, Total, Weigh
from adaptermix.methods import METHODS, MergeMethod, StackMethod
from adaptermix.methods.base import options_of
from adaptermix.testing import MergeMethodLaws

from .table import TABLE, Row


def _class_of(row: Row) -> type[MergeMethodLaws]:
    body = {"method": row.make(), "neutral": row.make_neutral(), "__doc__": "The laws.", **row.laws}
    return type("TestLaws", (MergeMethodLaws,), body)


for _name, _row in TABLE.items():
    _words = "".join(word.title() for word in _name.replace("-", " ").replace(",", "").split())
    globals()[f"Test{_words}"] = _class_of(_row)


def test_the_table_of_tests_and_the_table_of_methods_agree() -> None:
    assert {row.name for row in TABLE.values()} == set(METHODS)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_method_is_a_value(name: str) -> None:
    method = TABLE[name].make()
    assert type(method) is METHODS[TABLE[name].name]
    assert method == TABLE[name].make()
    assert pickle.loads(pickle.dumps(method)) == method  # noqa: S301


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_says_what_it_does_with_which_options_and_from_where(name: str) -> None:
    text = METHODS[name].__doc__ or ""
    assert "Reference:" in text
    assert "Exact when:" in text or "Differs from" in text
    for option in options_of(METHODS[name]):
        assert f"        {option}: " in text


@dataclass(frozen=True, slots=True, kw_only=True)
class Added(StackMethod):
    """Another package's method: the weighted sum."""

    def operators(self) -> Sequence[Operator]:
        return Weigh(), Total()


class TestAnotherPackagesMethodInheritsTheLaws(MergeMethodLaws):
    """A method that is in no table."""

    method = Added()
    linear = True
    additive = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Broken(MergeMethod):
    """One of several mistakes."""

    fault: str
    memory: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(calls=0), compare=False)

    def __call__(self, stack: Stack) -> Update:
        """Add up wrongly."""
        self.memory.calls += 1
        return Dense(w=MISTAKES[self.fault](stack, stack.combined(stack.weights).dense(), self.memory.calls))


def _writes(stack: Stack, total: Tensor, _: int) -> Tensor:
    first = stack.updates[0]
    assert isinstance(first, LowRank)
    first.a.mul_(1.0)
    return total


def _adds_factors(stack: Stack, _total: Tensor, _: int) -> Tensor:
    low = [update for update in stack.updates if isinstance(update, LowRank)]
    return torch.stack([u.b.mean(1, keepdim=True) @ u.a.mean(0, keepdim=True) for u in low]).sum(0)


def _counts_factors(stack: Stack, total: Tensor, _: int) -> Tensor:
    return total / sum(bool(update.a.any()) for update in stack.updates if isinstance(update, LowRank))


MISTAKES: dict[str, Callable[[Stack, Tensor, int], Tensor]] = {
    "writes": _writes,
    "forgets weights": lambda stack, _, __: stack.combined([1.0] * len(stack.updates)).dense(),
    "adds a constant": lambda _, total, __: total + 1.0,
    "adds factors": _adds_factors,
    "favours the first": lambda stack, _, __: stack.updates[0].dense(),
    "draws from torch": lambda _, total, __: total * torch.rand(()),
    "remembers": lambda _, total, calls: total * calls,
    "squares": lambda _, total, __: total.square(),
    "half": lambda _, total, __: total.half().to(total.dtype),
    "divides": lambda stack, total, _: total / stack.updates[0].dense(),
    "transposes": lambda _, total, __: total.T.contiguous(),
    "counts factors": _counts_factors,
    "narrows": lambda _, total, __: total.float(),
}


FAULTS = {
    "writes": "test_inputs_are_untouched",
    "forgets weights": "test_a_linear_method_is_the_weighted_sum",
    "adds a constant": "test_zero_adapters_give_zero",
    "adds factors": "test_only_the_deltas_count_not_their_factors",
    "favours the first": "test_the_order_of_the_adapters_does_not_matter",
    "draws from torch": "test_equal_inputs_give_equal_bytes",
    "counts factors": "test_how_an_adapter_is_zero_does_not_matter",
    "remembers": "test_equal_inputs_give_equal_bytes",
    "squares": "test_longer_adapters_give_a_longer_merge",
    "half": "test_one_adapter_of_weight_one_comes_back",
    "divides": "test_finite_adapters_give_a_finite_merge_or_one_sentence",
    "transposes": "test_finite_adapters_give_a_finite_merge_or_one_sentence",
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_method_with_a_fault_fails_the_law_about_it(fault: str) -> None:
    laws = type("Laws", (MergeMethodLaws,), {"method": _Broken(fault=fault), "linear": True, "takes_dense": False})()
    with pytest.raises(AssertionError):
        getattr(laws, FAULTS[fault])()


def test_a_method_that_narrows_fails_the_laws_about_dtypes() -> None:
    laws = type("Laws", (MergeMethodLaws,), {"method": _Broken(fault="narrows")})()
    with pytest.raises(AssertionError, match=r"must give torch\.float64"):
        laws.test_half_precision_is_merged_in_float32_and_wider_is_kept(torch.float64, torch.float64)
