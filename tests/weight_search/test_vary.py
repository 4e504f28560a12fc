"""What `--vary` stands for."""

from __future__ import annotations

import pytest

from adaptermix.weight_search.parameters import Choice, Interval, described, read_parameter
from adaptermix.weight_search.storage import distribution, fitting_sampler

from ..refusals import refuses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6:12", Interval(6, 12, whole=True)),
        ("6.0:12", Interval(6.0, 12.0)),
        ("-1:1", Interval(-1, 1, whole=True)),
        (" 1e-4 : 1e-2 : log ", Interval(1e-4, 1e-2, log=True)),
        ("1:64:log", Interval(1, 64, log=True, whole=True)),
        ("0.05,0.1", Choice((0.05, 0.1))),
        ("1", Choice((1,))),
        ("true,False", Choice((True, False))),
        ("elect_first,scale_first", Choice(("elect_first", "scale_first"))),
        ("1e-4,1E-3,one", Choice((1e-4, 1e-3, "one"))),
        ("'a b', c", Choice(("a b", "c"))),
        ("[[a, b], c]", Choice((["a", "b"], "c"))),
        ("[0:100]", Choice(("0:100",))),
        ("de=a.tsv,hf:me/it:de", Choice(("de=a.tsv", "hf:me/it:de"))),
    ],
)
def test_ranges_and_values(text: str, expected: object) -> None:
    found = read_parameter("key", text)
    assert found == expected
    assert repr(found) == repr(expected)  # 1 is no True, nor 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "1,1",
        "1,1.0",
        "2:1",
        "1:1",
        "a:b",
        "0:1:log",
        "-1:1:log",
        "1:2:lin",
        "1:2:log:3",
        "1:inf",
        "[a",
        ",a",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with refuses("vary.value: key"):
        read_parameter("key", text)


def test_ranges_become_optunas() -> None:
    whole, log = distribution(read_parameter("key", "6:12")), distribution(read_parameter("key", "0.1:10:log"))
    assert (type(whole).__name__, whole.low, whole.high) == ("IntDistribution", 6, 12)
    assert (type(log).__name__, log.log) == ("FloatDistribution", True)
    assert described(read_parameter("key", "6:12")) == [6, 12]


def test_few_numbers_suit_gp() -> None:
    assert fitting_sampler([Interval(0, 1)] * 8) == "gp"
    assert fitting_sampler([Interval(0, 1)] * 9) == fitting_sampler([Choice((1, 2))]) == "tpe"
