"""Errors carry codes, also through pydantic, pickling and the errors of other libraries that report them."""

from __future__ import annotations

import json
import pickle

import click
import pytest
from pydantic import BaseModel, ValidationError, field_validator, model_validator

from adaptermix.cli.console import fail
from adaptermix.errors import DataError, InvalidValueError, PlanError, ReportedElsewhere, code_of, codes_of

from .refusals import refuses


class Options(BaseModel, extra="forbid"):
    rank: int = 1
    rows: str = ""

    @field_validator("rows")
    @classmethod
    def check_rows(cls, rows: str) -> str:
        if rows == "x":
            raise InvalidValueError("rows are needed", code="option.rows")
        return rows

    @model_validator(mode="after")
    def check(self) -> Options:
        if self.rank == 7:
            raise InvalidValueError("not 7", code="rank.seven")
        return self


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        ({"rank": 7}, ["rank.seven"]),
        ({"rows": "x"}, ["option.rows"]),
        ({"rank": "a", "rows": "x", "other": 1}, ["option.int-parsing", "option.rows", "option.extra-forbidden"]),
    ],
)
def test_codes_of_all_faults_of_a_set_of_options_are_found(values: dict[str, object], codes: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Options(**values)
    assert codes_of(caught.value) == codes
    with refuses(codes[-1]):
        Options(**values)


def test_a_code_survives_pickling_and_is_reported_through_other_errors() -> None:
    error = PlanError("the rank must be at least 1", code="rank.too-small")
    assert pickle.loads(pickle.dumps(error)).code == "rank.too-small"  # noqa: S301  (our own bytes)
    outer = click.UsageError("wrong")
    outer.__cause__ = error
    assert codes_of(outer) == ["rank.too-small"]
    assert code_of(outer, "other") == "rank.too-small"
    assert code_of(ValueError("of another library"), "method.failed") == "method.failed"
    assert ReportedElsewhere("it failed", interrupted=True, code="processes.elsewhere").interrupted


def test_refuses_fails_for_another_code_and_for_no_error() -> None:
    with pytest.raises(AssertionError, match=r"expected a.b, got \['c.d'\]"), refuses("a.b"):
        raise PlanError("text", code="c.d")
    with pytest.raises(AssertionError, match="Regex pattern"), refuses("c.d: other"):
        raise PlanError("text", code="c.d")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"), refuses("a.b"):
        pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("a", code="data.empty"), {"code": "data.empty"}),
        (DataError("of a task from another package"), {"code": "other"}),
        (
            PlanError("a", code="recipe.invalid", codes=["a.b", "c.d"]),
            {"code": "option.several", "codes": ["a.b", "c.d"]},
        ),
        (click.NoSuchOption("--x"), {"code": "usage.no-such-option"}),
        (click.UsageError("wrong"), {"code": "usage.invalid"}),
        (OSError("disk"), {"code": "system.os-error"}),
        (MemoryError(), {"code": "system.out-of-memory-error"}),
        (KeyboardInterrupt(), {"code": "system.interrupted"}),
    ],
)
def test_failures_as_json_have_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, expected: dict[str, object]
) -> None:
    fail(error, as_json=True)
    document = json.loads(capsys.readouterr().out)["error"]
    assert {key: value for key, value in document.items() if key not in {"kind", "message"}} == expected
