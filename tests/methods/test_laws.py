"""Every method of the table is held to the laws, and the table holds every method."""

from __future__ import annotations

import pytest

from adaptermix.methods import METHODS

from .laws import MergeLaws
from .table import TABLE, Row


@pytest.fixture(scope="module", params=sorted(TABLE))
def row(request: pytest.FixtureRequest) -> Row:
    return TABLE[request.param]


class TestEveryMethod(MergeLaws):
    """The laws, once per row."""


def test_the_table_of_tests_and_the_table_of_methods_agree() -> None:
    assert set(TABLE) == set(METHODS)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_row_makes_the_method_of_its_name(name: str) -> None:
    method = TABLE[name].make()
    assert type(method) is METHODS[name]
    assert method.name == name


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_method_is_described(name: str) -> None:
    assert (METHODS[name].__doc__ or "").strip().count("\n") >= 3
