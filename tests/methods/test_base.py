"""The table of methods: entering, building, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass

import pytest

from adaptermix.algebra import Stack, Update
from adaptermix.errors import PlanError
from adaptermix.methods import METHODS, MergeMethod, method
from adaptermix.methods.base import build
from adaptermix.methods.exact import Exact

from ..refusals import refuses


@pytest.fixture
def trimmed() -> Iterator[type[MergeMethod]]:
    """A method with an option, entered for one test."""

    @method("trimmed")
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Trimmed(MergeMethod):
        density: float = 0.5

        def __post_init__(self) -> None:
            if not 0 < self.density <= 1:
                raise ValueError(f"density must be in (0, 1], got {self.density}.")

        def __call__(self, stack: Stack) -> Update:
            return stack.updates[0]

    yield Trimmed
    del METHODS["trimmed"]


def test_build_gives_the_method_of_the_name() -> None:
    assert isinstance(build("exact", {}), Exact)


def test_build_passes_the_options_on(trimmed: type[MergeMethod]) -> None:
    assert build("trimmed", {"density": 0.25}) == trimmed(density=0.25)


def test_a_misspelt_method_is_refused_with_the_near_one() -> None:
    with pytest.raises(PlanError) as caught:
        build("exatc", {})
    known = ", ".join(sorted(METHODS))
    assert str(caught.value) == f"unknown merge method 'exatc'. Did you mean 'exact'? Known: {known}."


def test_a_method_far_from_any_name_is_refused_with_the_list() -> None:
    with pytest.raises(PlanError) as caught:
        build("zzz", {})
    assert str(caught.value) == f"unknown merge method 'zzz'. Known: {', '.join(sorted(METHODS))}."


def test_a_misspelt_option_is_refused_with_the_near_one(trimmed: type[MergeMethod]) -> None:
    with pytest.raises(PlanError) as caught:
        build("trimmed", {"densty": 0.3})
    assert str(caught.value) == ("unknown option of method 'trimmed' 'densty'. Did you mean 'density'? Known: density.")


def test_an_option_of_a_method_without_options_is_refused() -> None:
    with refuses("method.unknown-option: 'exact' 'density'"):
        build("exact", {"density": 0.3})


def test_the_name_of_a_method_is_not_an_option() -> None:
    with refuses("method.unknown-option: 'exact' 'name'"):
        build("exact", {"name": "other"})


def test_a_value_that_the_method_refuses_names_the_method(trimmed: type[MergeMethod]) -> None:
    with refuses(r"method.option-value: trimmed.*density must be in \(0, 1\], got 0.*0"):
        build("trimmed", {"density": 0.0})


def test_a_value_of_the_wrong_kind_names_the_method(trimmed: type[MergeMethod]) -> None:
    with refuses("method.option-type: density.*trimmed.*float.*'much'"):
        build("trimmed", {"density": "much"})


def test_a_name_that_is_taken_is_refused_and_the_first_stays() -> None:
    with refuses("registry.name-taken: 'exact'.*Exact"):
        method("exact")(Exact)
    assert METHODS["exact"] is Exact


def test_methods_are_frozen_and_equal_by_value() -> None:
    assert Exact() == Exact()
    assert hash(Exact()) == hash(Exact())
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        Exact().density = 1.0  # type: ignore[attr-defined]


def test_the_abstract_method_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        MergeMethod()  # type: ignore[abstract]
